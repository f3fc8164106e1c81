"""Compile a model ahead of time, which takes minutes and a C++ compiler, and run the folder.

python examples/export_and_run.py
python examples/export_and_run.py FOLDER
"""

import sys
import tempfile
from pathlib import Path

import mmchat
from mmchat.export import ExportPlan, export_model
from mmchat.loading.options import LoadOptions

FOLDER = f"{tempfile.gettempdir()}/tiny-aoti"


def main(folder: str = FOLDER) -> None:
    plan = ExportPlan(LoadOptions("tiny", max_seq_len=512), Path(folder), format="aoti")
    report = export_model(plan)
    print(f"{report.folder}: {sum(report.sizes.values()):,} bytes in {report.seconds:.0f} s")
    model = mmchat.load(folder)  # maps the weights, loads the programs, compiles nothing
    *_, end = model.chat().send("What's in this image?", images=["assets/dog.jpg"])
    if isinstance(end, mmchat.Finished):
        print(end.text)


if __name__ == "__main__":
    main(*sys.argv[1:])
