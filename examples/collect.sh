#!/bin/sh
# Copy the pictures of a folder that show something into another folder.
#
# sh examples/collect.sh assets "a dog" dogs
set -eu
if [ $# -ne 3 ]; then
    echo "usage: sh $0 FOLDER WHAT INTO" >&2
    exit 2
fi
folder=$1 what=$2 into=$3

# Exit code 8 says that some pictures cannot be read; the others count.
ranked=$(mmchat find "$what" "$folder" --top 1000000 -q) || [ $? -eq 8 ]
found=$(printf '%s\n' "$ranked" | awk -F '\t' 'NR > 1 && $1 + 0 >= 50 { print $2 }')
if [ -z "$found" ]; then
    echo "$0: no picture shows $what by 50 % or more" >&2
    exit 1
fi
mkdir -p "$into"
printf '%s\n' "$found" | while IFS= read -r picture; do
    cp "$picture" "$into"
    printf '%s\n' "$picture"
done
