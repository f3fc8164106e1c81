"""Show the answers of a batch as one page: each picture, the answer, and a link to the file.

mmchat batch assets/*.jpg -o answers.jsonl
python examples/contact_sheet.py answers.jsonl sheet.html

Where rows have a custom_id of their own, give the JSONL that was asked as a third argument: it says
which picture is meant. Without it such an answer has none.
"""

import html
import json
import sys
from pathlib import Path

HEAD = """<!doctype html>
<meta charset="utf-8"><title>Answers</title>
<style>
body { font: 14px sans-serif } main { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; width: 16em } img { width: 100% } .failed { color: #b00 }
</style>
<main>
"""


def figure(row: dict, picture: str) -> str:
    address = picture.startswith(("http:", "https:", "data:"))
    link = html.escape(picture if address else Path(picture).resolve().as_uri())
    image = f'<a href="{link}"><img loading="lazy" alt="" src="{link}"></a>'
    failed = row["error"]
    said = f'<span class="failed">{html.escape(failed["message"])}</span>' if failed else ""
    return (
        f"<figure>{image if address or Path(picture).is_file() else ''}<figcaption>"
        f"<small>{html.escape(row['custom_id'])}</small><br>{said or html.escape(row['text'])}"
        "</figcaption></figure>\n"
    )


def lines(file: str) -> list[dict]:
    return [json.loads(line) for line in Path(file).read_text("utf-8").split("\n") if line.strip()]


def main(answers: str, page: str, asked: str | None = None) -> None:
    pictures = {}
    for row in lines(asked) if asked else []:
        image = row.get("image") or None
        pictures[row.get("custom_id")] = image[0] if isinstance(image, list) else image
    rows = sorted(lines(answers), key=lambda row: row["custom_id"])
    figures = [figure(row, pictures.get(row["custom_id"]) or row["custom_id"]) for row in rows]
    Path(page).write_text(HEAD + "".join(figures) + "</main>\n", "utf-8")
    print(f"{page}: {len(rows)} pictures")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
