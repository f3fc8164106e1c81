"""Show the answers of a batch as one page: each picture, the answer, and a link to the file.

mmchat batch assets/*.jpg -o answers.jsonl
python examples/contact_sheet.py answers.jsonl sheet.html
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


def figure(row: dict) -> str:
    path = Path(row["custom_id"])
    link = html.escape(path.resolve().as_uri())
    failed = row["error"]
    said = f'<span class="failed">{html.escape(failed["message"])}</span>' if failed else ""
    return (
        f'<figure><a href="{link}"><img loading="lazy" alt="" src="{link}"></a><figcaption>'
        f"<small>{html.escape(str(path))}</small><br>{said or html.escape(row['text'])}"
        "</figcaption></figure>\n"
    )


def main(answers: str, page: str) -> None:
    rows = [json.loads(line) for line in Path(answers).read_text("utf-8").splitlines()]
    rows.sort(key=lambda row: row["custom_id"])
    Path(page).write_text(HEAD + "".join(map(figure, rows)) + "</main>\n", "utf-8")
    print(f"{page}: {len(rows)} pictures")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
