#!/bin/sh
# Copy the pictures of a folder that show something into another folder.
#
# sh examples/collect.sh assets "a dog" dogs
set -eu
folder=$1 what=$2 into=$3

mkdir -p "$into"
mmchat find "$what" "$folder" --top 1000000 -q |
    awk -F '\t' 'NR > 1 && $1 + 0 >= 50 { print $2 }' |
    while IFS= read -r picture; do
        cp "$picture" "$into"
        printf '%s\n' "$picture"
    done
