"""Pages of documents are pictures: which, how they are named and drawn, and what is refused."""

import io
import sys

import numpy as np
import pytest
from PIL import Image as PILImage

from mmchat import limits
from mmchat.errors import ImageError, MissingExtra
from mmchat.images import load_each, load_image, load_images, worker
from mmchat.images.bounds import RefusedError, tiff_pages
from mmchat.images.decode import count_pages, decode
from mmchat.images.pages import page_numbers, split_pages

COLOURS = ((250, 0, 0), (0, 250, 0), (0, 0, 250))


def pages(kind: str, count: int = 3, size: tuple[int, int] = (30, 40)) -> bytes:
    first, *rest = [PILImage.new("RGB", size, COLOURS[i % 3]) for i in range(count)]
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=rest)
    return file.getvalue()


def objects(*bodies: bytes, trailer: bytes = b"") -> bytes:
    """A PDF of these objects, the first of which is its root."""
    data, places = b"%PDF-1.7\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size = len(bodies) + 1
    head = b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    end = b"trailer\n<</Size %d /Root 1 0 R %s>>\nstartxref\n%d\n%%%%EOF\n"
    return data + head + end % (size, trailer, len(data))


def one_page(box: str = "0 0 72 144", content: bytes = b"", more: bytes = b"") -> bytes:
    return objects(
        b"<</Type /Catalog /Pages 2 0 R>>",
        b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
        b"<</Type /Page /Parent 2 0 R /MediaBox [%s] /Contents 4 0 R %s>>" % (box.encode(), more),
        b"<</Length %d>>\nstream\n%s\nendstream" % (len(content), content),
    )


def refused(data: bytes, error: type[Exception] = ImageError) -> str:
    with pytest.raises(error) as caught:
        load_images([data], names=["a.pdf"])
    assert str(caught.value).startswith(("'a.pdf' ", "'a.pdf page 1' "))
    assert "0x" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["PDF", "TIFF"])
def document(request, tmp_path):
    path = tmp_path / f"paper.{request.param.lower()}"
    path.write_bytes(pages(request.param))
    return path


def shown(image) -> tuple[str, int]:
    """The name without its folder, and the colour by its place in COLOURS."""
    red_green_blue = np.asarray(image.pixels)[2, 2]
    return image.source.rpartition("/")[2], int(red_green_blue.argmax())


def test_all_pages_or_those_that_are_named(document):
    name = document.name
    every = [(f"{name} page {number}", number - 1) for number in (1, 2, 3)]
    opened = load_images([str(document)])
    assert [shown(image) for image in opened] == every
    assert all(image.notices == () for image in opened)
    for behind, wanted in (("#2", [2]), ("#2-3", [2, 3]), ("#3,1", [3, 1]), ("#page=2", [2])):
        images = load_images([f"{document}{behind}"])
        assert [shown(image) for image in images] == [every[number - 1] for number in wanted]
    assert [shown(i) for i in load_images([f"{document.as_uri()}#1"])] == every[:1]
    assert [shown(i) for i in load_images([document.with_name(f"{name}#3")])] == every[2:]


def test_each_source_has_its_own_pages(document):
    red = PILImage.new("RGB", (5, 5), COLOURS[0])
    each = load_each([f"{document}#2-3", red, document.read_bytes()], names=[None, None, "stdin"])
    assert [[shown(image)[1] for image in images] for images in each] == [[1, 2], [0], [0, 1, 2]]
    assert [image.source for image in each[2]] == ["stdin page 1", "stdin page 2", "stdin page 3"]


def test_where_one_picture_is_taken_it_is_the_first_or_the_one_that_is_named(document):
    image = load_image(document)
    assert image.notices == ("only the first of 3 pages is used",)
    assert shown(image) == (document.name, 0)
    assert shown(load_image(f"{document}#2")) == (f"{document.name} page 2", 1)
    with pytest.raises(ImageError, match=r"asked for 2 pages, and this takes one; write '#2'"):
        load_image(f"{document}#2-3")


@pytest.mark.parametrize("kind", ["PDF", "TIFF"])
def test_a_document_of_one_page_keeps_its_name(kind):
    [image] = load_images([pages(kind, 1)], names=["letter"])
    assert (image.source, image.notices) == ("letter", ())


def test_a_file_whose_name_holds_the_sign_wins(tmp_path):
    (tmp_path / "a#1").write_bytes(pages("TIFF"))
    (tmp_path / "a").write_bytes(pages("TIFF", 1))
    assert len(load_images([str(tmp_path / "a#1")])) == 3
    assert len(load_images([str(tmp_path / "a#1#2")])) == 1


def test_a_data_url_may_hold_a_document():
    import base64

    text = base64.b64encode(pages("PDF")).decode()
    assert len(load_images([f"data:application/pdf;base64,{text}"])) == 3


def test_an_address_may_name_pages_and_a_place_in_a_picture_is_none(monkeypatch):
    from mmchat.images import web

    monkeypatch.setattr(web, "fetch", lambda _: pages("PDF"))
    names = [image.source for image in load_images(["https://a.org/paper.pdf#page=2"])]
    assert names == ["https://a.org/paper.pdf page 2"]
    monkeypatch.setattr(web, "fetch", lambda _: pages("PNG", 1))
    assert load_image("https://a.org/dog.png#2").source == "https://a.org/dog.png#2"


@pytest.mark.parametrize("behind", ["#4", "#0", "#3-2", "#1-", "#,", "#1,9", "#9999999999"])
def test_pages_that_are_not_there(document, behind):
    with pytest.raises(ImageError, match=r"pages are written '#3', '#3-5' or '#1,4'"):
        load_images([f"{document}{behind}"])


def test_a_picture_has_no_pages(tmp_path):
    PILImage.new("RGB", (5, 5)).save(tmp_path / "dog.png")
    with pytest.raises(ImageError, match=r"is a picture \(PNG\) without pages; omit '#2'"):
        load_images([str(tmp_path / "dog.png#2")])


def test_numbers_of_pages():
    assert split_pages("a.pdf#3-5,7") == ("a.pdf", "3-5,7")
    assert split_pages("a.pdf#page=3") == ("a.pdf", "3")
    assert split_pages("a#b.pdf") == ("a#b.pdf", "")
    assert page_numbers("", 3) == [1, 2, 3]
    assert page_numbers("2-3,1", 3) == [2, 3, 1]
    most = limits.DOCUMENT_PAGES
    assert len(page_numbers(f"5-{most + 4}", 400)) == most
    for pages, count in ((f"1-{most},400", 400), ("", most + 1), ("1-9999999", 10**7)):
        with pytest.raises(RefusedError, match=rf"at most {most} go into one .*'#1-{most}'"):
            page_numbers(pages, count)


def test_too_many_pages_are_refused_before_one_is_drawn(monkeypatch):
    monkeypatch.setattr(limits, "DOCUMENT_PAGES", 2)
    asked, ask = [], worker.Worker.ask
    monkeypatch.setattr(
        worker.Worker, "ask", lambda *a: (asked.append("only_pages" in a[1]), ask(*a))[1]
    )
    assert "it has 3 pages, and at most 2" in refused(pages("PDF"))
    monkeypatch.setattr(limits, "DOCUMENT_PAGES", 3)
    monkeypatch.setattr(limits, "IMAGES_PER_PROMPT", 5)
    with pytest.raises(ImageError, match=r"are 6 together.*at most 5; name fewer pages"):
        load_images([pages("PDF"), pages("PDF")])
    assert asked == [True] * 3


def test_a_document_goes_to_the_decoder_once_for_all_its_pages(monkeypatch, document):
    sent, dumps = [], worker.json.dumps
    monkeypatch.setattr(worker.json, "dumps", lambda it: (sent.append(it["bytes"]), dumps(it))[1])
    images = load_images([document])
    assert sent == [document.stat().st_size, *[None] * (len(sent) - 1)]
    assert len(sent) >= len(images) == 3
    other = load_images([document, document])  # each again, when it is its turn
    assert [i.content_hash for i in other] == [i.content_hash for i in images] * 2
    alone = [load_image(f"{document}#{number}") for number in (1, 2, 3)]
    assert [i.content_hash for i in images] == [i.content_hash for i in alone]


def test_smaller_copies_and_masks_in_a_tiff_are_no_pages():
    import struct

    def frame(kind: int, behind: int) -> bytes:
        return struct.pack("<HHHIIII", 2, 254, 4, 1, kind, 0, 0) + struct.pack("<II", 0, behind)

    size = len(frame(0, 0))
    for kinds, found in (((0, 1, 0, 4), [0, 2]), ((1, 0, 2), [0, 1, 2])):
        data = b"II*\0" + struct.pack("<I", 8)
        for index, kind in enumerate(kinds, 1):
            data += frame(kind, 8 + index * size if index < len(kinds) else 0)
        assert tiff_pages(data) == found


def test_a_page_is_drawn_on_white_at_a_bounded_size():
    image = load_image(one_page(content=b"1 0 0 rg 0 0 36 72 re f"))
    assert (image.width, image.height) == (200, 400)
    assert image.pixels.getpixel((150, 100)) == (255, 255, 255)
    assert image.pixels.getpixel((50, 300)) == (255, 0, 0)
    assert (load_image(one_page("0 0 14400 800")).width, limits.PDF_SIDE_PIXELS) == (2240, 2240)
    thin = load_image(one_page("0 0 14400 0.01"))
    assert (thin.width, thin.height) == (2240, 1)
    turned = load_image(one_page(more=b"/Rotate 90"))
    assert (turned.width, turned.height) == (400, 200)


def test_what_a_form_is_filled_with_is_drawn():
    field = (
        b"<</Type /Annot /Subtype /Widget /FT /Tx /T (a) /F 4 /Rect [0 0 72 144]"
        b" /AP <</N 6 0 R>> >>"
    )
    look = b"0 0 1 rg 0 0 72 144 re f"
    data = objects(
        b"<</Type /Catalog /Pages 2 0 R /AcroForm <</Fields [5 0 R]>> >>",
        b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
        b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 72 144] /Annots [5 0 R]>>",
        b"null",
        field,
        b"<</Type /XObject /Subtype /Form /BBox [0 0 72 144] /Length %d>>\nstream\n%s\nendstream"
        % (len(look), look),
    )
    red, _, blue = load_image(data).pixels.getpixel((100, 200))
    assert blue > red


@pytest.mark.parametrize("box", ["0 0 1000000000 1000000000", "0 0 1000000000 72", "0 0 14401 10"])
def test_a_page_of_a_huge_size_is_refused(box):
    reason = refused(one_page(box))
    assert "at most 14,400 on a side are drawn" in reason or "is damaged" in reason


def test_damaged_documents_are_refused():
    whole = pages("PDF")
    assert "is cut short" in refused(b"%PDF-1.7\n")
    for length in range(9, len(whole) - 20, len(whole) // 12):
        assert "is cut short" in refused(whole[:length])
    assert "is damaged" in refused(b"%PDF-1.7\n" + b"x" * 99 + b"\nstartxref\n9\n%%EOF\n")
    none = (b"<</Type /Catalog /Pages 2 0 R>>", b"<</Type /Pages /Kids [] /Count 0>>")
    assert "has no pages; copy" in refused(objects(*none))
    lying = (none[0], b"<</Type /Pages /Kids [] /Count 3>>")
    assert "is damaged" in refused(objects(*lying))
    many = (none[0], b"<</Type /Pages /Kids [] /Count 1000000000>>")
    assert "has no pages" in refused(objects(*many))
    updated = whole + b"99 0 obj\n<</Length 9>>"
    assert "is cut short" in refused(updated)


def test_a_document_with_a_password_is_refused():
    data = objects(
        b"<</Type /Catalog /Pages 2 0 R>>",
        b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
        b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 72 72]>>",
        b"<</Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s>>>" % (b"ab" * 32, b"cd" * 32),
        trailer=b"/Encrypt 4 0 R /ID [<00><00>]",
    )
    assert "is locked with a password; save it without one" in refused(data)


@pytest.mark.slow
def test_an_endless_page_ends_with_its_time(monkeypatch):
    monkeypatch.setattr(limits, "DECODE_CPU_SECONDS", 1.0)
    curve = b"0 0 m 9 99 60 3 70 140 c 1 99 60 3 70 14 c S " * 200_000
    assert "takes longer than 1 s" in refused(one_page(content=b"30 w 0 0.5 d [1 1] 0 d " + curve))
    assert load_image(one_page()).width == 200


def test_a_picture_in_a_page_that_takes_all_memory():
    import zlib

    packed = zlib.compress(bytes(20_000_000), 9)
    data = objects(
        b"<</Type /Catalog /Pages 2 0 R>>",
        b"<</Type /Pages /Kids [3 0 R] /Count 1>>",
        b"<</Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] /Contents 4 0 R"
        b" /Resources <</XObject <</I 5 0 R>> >> >>",
        b"<</Length 24>>\nstream\n72 0 0 72 0 0 cm /I Do  \nendstream",
        b"<</Type /XObject /Subtype /Image /Width 60000 /Height 60000 /BitsPerComponent 8"
        b" /ColorSpace /DeviceRGB /Filter /FlateDecode /Length %d>>\nstream\n%s\nendstream"
        % (len(packed), packed),
    )
    assert load_image(data).width == 200  # PDFium leaves out what it has no memory for
    assert load_image(one_page()).width == 200


def test_without_the_extra_its_name_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    for read in (
        lambda: decode(one_page(), "PDF", limits.IMAGE_PIXELS),
        lambda: count_pages(one_page(), "PDF"),
    ):
        with pytest.raises(RefusedError, match=r"pip install 'mmchat\[pdf\]'") as caught:
            read()
        assert caught.value.missing_extra
    refusal = {"reason": "is a PDF", "missing_extra": True}
    monkeypatch.setattr(worker.Worker, "ask", lambda *_: refusal)
    assert refused(one_page(), MissingExtra) == "'a.pdf' is a PDF"
