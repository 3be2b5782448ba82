"""Texts from templates: fields, what an empty one takes along, metadata of photos, lengths."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from rows import captioned, failed
from tiny import picture

from captioner.errors import UserError
from infer import empty_fields, photo_metadata, templates
from infer.listing import ImageFile
from infer.photo_metadata import PhotoMetadata, read_metadata
from infer.templates import FIELDS, Template, clean, shorten

CITY = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:ps="http://ns.adobe.com/photoshop/1.0/" ps:City="Málaga &amp; Co"><ps:Country>Spain</ps:Country>
</rdf:Description></rdf:RDF></x:xmpmeta>"""
EXIF_IFD, GPS_IFD = 0x8769, 0x8825


def exif(*, taken: Any = "2024:05:17 14:03:22", gps: dict[int, Any] | None = None) -> Image.Exif:
    found = Image.Exif()
    found[0x010F], found[0x0110] = "Apple", "iPhone 12"
    found.get_ifd(EXIF_IFD)[0x9003] = taken
    found.get_ifd(GPS_IFD).update(
        {1: "N", 2: (48.0, 51.0, 30.24), 3: "E", 4: (2.0, 17.0, 40.2)} if gps is None else gps
    )
    return found


def save(file: Path, **options: Any) -> Path:
    picture(1).save(file, **options)
    return file


def metadata_of(file: Path) -> PhotoMetadata:
    return read_metadata(ImageFile(str(file.parent), file.name))


# ---- fields -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "{alt} {folder}, {date}",
            ["A cat. pets, 2024-05-17", "A cat. pets", "A cat. pets, 2024-05-17", "A cat. pets"],
        ),
        ("{alt} ({place}), {date}", ["A cat. (Rome), 2024-05-17", "A cat. (Rome)", "A cat. 2024-05-17", "A cat."]),
        ("{alt} [{place}, {date}]", ["A cat. [Rome, 2024-05-17]", "A cat. [Rome]", "A cat. [2024-05-17]", "A cat."]),
        ("{date}: {alt}", ["2024-05-17: A cat.", "A cat.", "2024-05-17: A cat.", "A cat."]),
        ("({date}) {place} - {alt}", ["(2024-05-17) Rome - A cat.", "Rome - A cat.", "(2024-05-17) A cat.", "A cat."]),
        ("{caption}. {place}. {date}.", ["a cat. Rome. 2024-05-17.", "a cat. Rome.", "a cat. 2024-05-17.", "a cat."]),
        ("{alt} {place}.", ["A cat. Rome.", "A cat. Rome.", "A cat.", "A cat."]),
        ("{place} {{{date}}}", ["Rome {2024-05-17}", "Rome", "{2024-05-17}", ""]),
        ("{place}, {date}", ["Rome, 2024-05-17", "Rome", "2024-05-17", ""]),
        ("{alt} #{place} #{date}", ["A cat. #Rome #2024-05-17", "A cat. #Rome", "A cat. #2024-05-17", "A cat."]),
        ("{alt} @ {place} & {date}", ["A cat. @ Rome & 2024-05-17", "A cat. @ Rome", "A cat. & 2024-05-17", "A cat."]),
        ("{folder}_{place}_{date}", ["pets_Rome_2024-05-17", "pets_Rome", "pets_2024-05-17", "pets"]),
        ('{alt} "{place}, {date}"', ['A cat. "Rome, 2024-05-17"', 'A cat. "Rome"', 'A cat. "2024-05-17"', "A cat."]),
        ("{alt}; © {place}, {date}", ["A cat.; © Rome, 2024-05-17", "A cat.; © Rome", "A cat.; 2024-05-17", "A cat."]),
        (
            "{alt} 📍 {place} 📅 {date}",
            ["A cat. 📍 Rome 📅 2024-05-17", "A cat. 📍 Rome", "A cat. 📅 2024-05-17", "A cat."],
        ),
        ("{confidence}% {place}°, {date}", ["0.90% Rome°, 2024-05-17", "0.90% Rome°", "0.90% 2024-05-17", "0.90%"]),
        ("{place}! {caption}? {date}", ["Rome! a cat? 2024-05-17", "Rome! a cat?", "a cat? 2024-05-17", "a cat?"]),
        ("{caption}, {place}. {date}", ["a cat, Rome. 2024-05-17", "a cat, Rome.", "a cat. 2024-05-17", "a cat."]),
        ("{caption}\n{place}\n{date}", ["a cat\nRome\n2024-05-17", "a cat\nRome", "a cat\n2024-05-17", "a cat"]),
        ("{folder}.{place}.{date}", ["pets.Rome.2024-05-17", "pets.Rome", "pets.2024-05-17", "pets"]),
        ("|{folder}|{place}|{date}|", ["|pets|Rome|2024-05-17|", "|pets|Rome|", "|pets|2024-05-17|", "|pets|"]),
        (
            "{alt} *{place}* **{date}**",
            ["A cat. *Rome* **2024-05-17**", "A cat. *Rome*", "A cat. **2024-05-17**", "A cat."],
        ),
        (
            "{caption}, the dogs' {place} (about {date})",
            [
                "a cat, the dogs' Rome (about 2024-05-17)",
                "a cat, the dogs' Rome (about)",
                "a cat, the dogs' (about 2024-05-17)",
                "a cat, the dogs' (about)",
            ],
        ),
    ],
)
def test_separators_and_brackets_around_empty_fields_are_left_out(
    monkeypatch: pytest.MonkeyPatch, template: str, expected: list[str]
) -> None:
    """With place and date, with one of them, without both."""
    texts = []
    for place, date in (("Rome", "2024-05-17"), ("Rome", ""), ("", "2024-05-17"), ("", "")):
        found = PhotoMetadata(place=place, date=date)
        monkeypatch.setattr(templates, "read_metadata", lambda _, found=found: found)
        texts.append(Template(template).text(captioned("pets/tom.jpg", confidence=0.9)))
    assert texts == expected


WRAPPINGS = [("", ""), *empty_fields.PAIRS, ("**", "**"), ('("', '")'), ("[<", ">]")]
PREFIXES = [("#", ""), ("@", ""), ("$", ""), ("📍", ""), ("", "%"), ("", "°")]  # with spaces between
CLOSE = ["_", "/", "|", "、", ":", "-", "+", "=", "→", "&"]
APART = [" ", ", ", "; ", ": ", *(f" {mark} " for mark in "-–—·•|/@&+=→>~#©®§*\\^📍"), "; © ", " -> ", " // "]
UNITS = st.tuples(st.sampled_from(CLOSE), st.sampled_from(WRAPPINGS)) | st.tuples(
    st.sampled_from(APART), st.sampled_from(WRAPPINGS + PREFIXES)
)


@given(UNITS, st.lists(st.booleans(), min_size=1, max_size=5))
def test_an_empty_field_leaves_no_trace(unit: tuple[str, tuple[str, str]], filled: list[bool]) -> None:
    """Whatever is around and between the fields: what remains is as if the template had no more fields."""
    separator, (before, behind) = unit
    assume(separator.strip() not in (before, behind) or separator == " ")  # "__" is no separator and a quote
    values = [f"Value {number}" if is_filled else "" for number, is_filled in enumerate(filled)]
    parts = []
    for number, value in enumerate(values):
        parts += [(True, (separator if number else "") + before), (False, value), (True, behind)]
    expected = separator.join(f"{before}{value}{behind}" for value in values if value)
    assert empty_fields.join(parts) == expected.strip()


@given(st.text(st.characters(categories=["P", "S", "Zs"]), max_size=5), st.booleans())
def test_no_mark_that_touches_an_empty_field_at_the_start_or_the_end_stays(marks: str, is_first: bool) -> None:
    parts = [(False, ""), (True, f"{marks} "), (False, "A cat.")] if is_first else None
    assert empty_fields.join(parts or [(False, "A cat."), (True, f" {marks}"), (False, ""), (True, marks)]) == "A cat."


def test_all_documented_fields_have_values(tmp_path: Path) -> None:
    (tmp_path / "été").mkdir()
    save(tmp_path / "été" / "tom.v2.jpg", exif=exif())
    row = captioned("été/tom.v2.jpg", root=str(tmp_path), confidence=0.70712, review="low confidence")
    expected = {
        "alt": "A cat.",
        "caption": "a cat",
        "confidence": "0.71",
        "review": "low confidence",
        "model": "m",
        "width": "640",
        "height": "480",
        "root": str(tmp_path),
        "path": "été/tom.v2.jpg",
        "name": "tom.v2.jpg",
        "stem": "tom.v2",
        "folder": "été",
        "date": "2024-05-17",
        "time": "14:03",
        "camera": "Apple iPhone 12",
        "place": "48.8584° N, 2.2945° E",
    }
    assert {field: Template(f"{{{field}}}").text(row) for field in FIELDS} == expected


@pytest.mark.parametrize(
    ("root", "path", "expected"),
    [
        ("https://host/my%20photos", "a%20b.jpg", "my photos/a b"),
        ("s3://bucket", "pets/100%25.jpg", "pets/100%25"),
        (".", "a.jpg", "here/a"),
        ("..", "other/a.jpg", "other/a"),
    ],
)
def test_names_and_folders_of_any_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str, path: str, expected: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert Template("{folder}/{stem}").text(captioned(path, root=root)) == expected


def test_a_text_is_one_line_of_valid_unicode() -> None:
    row = captioned(os.fsdecode(b"bad\xff\x1b[31m\nname.jpg"))
    assert Template("{alt} {stem}").text(row) == "A cat. bad\N{REPLACEMENT CHARACTER} [31m name"


def test_failures_and_abstained_rows_have_no_text() -> None:
    template = Template("{caption}", prefix="photo of ")
    assert template.text(failed("a.jpg")) == template.text(captioned("a.jpg", alt="")) == ""
    assert template.text(captioned("a.jpg")) == "photo of a cat"


@pytest.mark.parametrize(
    "template",
    [
        "{}", "{0}", "{nothing}", "{alt.__class__}", "{alt[0]}", "{alt!r}", "{alt:>10}", "{alt:{name}}", "{ alt}",
        "{alt", "alt}", "no field", "", "{alt}\0",
    ],
)  # fmt: skip
def test_whatever_is_no_bare_known_field_is_refused(template: str) -> None:
    with pytest.raises(UserError, match="--template"):
        Template(template)


PIECES = st.sampled_from(
    [
        "{alt}",
        "{caption}",
        "{model}",
        "{{",
        "}}",
        "{",
        "}",
        "{alt!r}",
        "{alt.x}",
        ", ",
        "(",
        ")",
        "\0",
        '"',
        "'",
        "«",
        "»",
        "<",
        ">",
        "#",
        "_",
        " @ ",
        "; ©",
        ". ",
        "**",
    ]
)


@given(st.lists(PIECES | st.text(max_size=3)).map("".join))
def test_with_a_value_for_each_field_a_template_gives_what_python_gives_or_is_refused(template: str) -> None:
    try:
        text = Template(template).text
    except UserError:
        return
    values = {"alt": "A cat.", "caption": "a cat", "model": "m"}
    assert text(captioned("a.jpg")) == template.format(**values).strip()


def test_unknown_fields_are_answered_with_all_names() -> None:
    with pytest.raises(UserError, match=re.escape(f"no field {{dates}}: use {', '.join(FIELDS)}")):
        Template("{alt} {dates}")


def test_what_is_not_utf8_is_refused() -> None:
    with pytest.raises(UserError, match="--prefix"):
        Template("{alt}", prefix=os.fsdecode(b"\xff"))


# ---- lengths ----------------------------------------------------------------------------------------------

FAMILY = "👨‍👩‍👧‍👦"


@pytest.mark.parametrize(
    ("text", "room", "expected"),
    [
        ("a dog", 5, "a dog"),
        ("a dog, that runs", 15, "a dog, that"),
        ("a dog, that runs", 6, "a dog"),
        ("a dog", 4, "a"),
        ("donaudampfschiff", 5, "donau"),
        ("cafe\u0301s", 4, "caf"),
        (f"a {FAMILY}", 8, "a"),
        (FAMILY * 2, len(FAMILY) + 3, FAMILY),
    ],
)
def test_texts_are_cut_behind_whole_words(text: str, room: int, expected: str) -> None:
    assert shorten(text, room=room) == expected


@given(st.text(st.sampled_from("ab ,\u0301👨\u200d👩🇩🇪é")), st.integers(1, 9))
def test_a_cut_text_fits_and_ends_between_letters(text: str, room: int) -> None:
    short = shorten(clean(text), room=room)
    assert len(short) <= room
    clusters = regex.findall(r"\X", clean(text))
    assert any(short == "".join(clusters[:number]) for number in range(len(clusters) + 1))


def test_the_length_counts_prefix_and_suffix() -> None:
    row = captioned("a.jpg", caption="a cat sleeps on a sofa")
    template = Template("{caption}", prefix="TOK, ", suffix="!", max_length=20)
    assert template.text(row) == "TOK, a cat sleeps!"
    with pytest.raises(UserError, match="leaves no room"):
        Template("{caption}", prefix="TOK, ", suffix="!", max_length=6)


# ---- metadata of photos -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_exif_is_read_from_the_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    file = save(tmp_path / f"a{suffix}", exif=exif().tobytes())

    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    found = metadata_of(file)
    expected = PhotoMetadata(date="2024-05-17", time="14:03", camera="Apple iPhone 12", place="48.8584° N, 2.2945° E")
    assert found == expected


def test_exif_of_heic_is_read(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    heif.from_pillow(picture(1)).save(tmp_path / "a.heic", exif=exif().tobytes())
    assert metadata_of(tmp_path / "a.heic").date == "2024-05-17"


@pytest.mark.external
@pytest.mark.skipif(shutil.which("exiftool") is None, reason="needs exiftool")
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_what_exiftool_writes_is_read(tmp_path: Path, suffix: str) -> None:
    file = save(tmp_path / f"a{suffix}")
    taken = ["-EXIF:DateTimeOriginal=2024:05:17 14:03:22", "-EXIF:Make=Canon", "-EXIF:Model=Canon EOS R5"]
    position = ["-GPSLatitude=41.9", "-GPSLatitudeRef=S", "-GPSLongitude=12.5", "-GPSLongitudeRef=W"]
    city = ["-XMP-photoshop:City=São Paulo & <co>", "-XMP-photoshop:Country=Brasil"]
    expected = PhotoMetadata(date="2024-05-17", time="14:03", camera="Canon EOS R5", place="41.9000° S, 12.5000° W")
    for flags, place in (([*taken, *position], expected.place), (city, "São Paulo & <co>, Brasil")):
        subprocess.run(["exiftool", "-q", "-overwrite_original", *flags, str(file)], check=True)
        assert metadata_of(file) == replace(expected, place=place)


def test_an_embedded_city_comes_before_the_position(tmp_path: Path) -> None:
    assert metadata_of(save(tmp_path / "a.jpg", exif=exif(), xmp=CITY.encode())).place == "Málaga & Co, Spain"
    assert metadata_of(save(tmp_path / "b.webp", exif=exif(), xmp=CITY)).place == "Málaga & Co, Spain"


def test_iptc_has_a_city_too(tmp_path: Path) -> None:
    records = b"".join(
        b"\x1c\x02" + bytes([number, 0, len(text)]) + text for number, text in ((90, b"Rome"), (101, b"Italy"))
    )
    block = b"8BIM\x04\x04\0\0" + len(records).to_bytes(4) + records + b"\0" * (len(records) % 2)
    segment = b"Photoshop 3.0\0" + block
    data = save(tmp_path / "plain.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2) + segment + data[2:])
    assert metadata_of(tmp_path / "a.jpg").place == "Rome, Italy"


@pytest.mark.parametrize("taken", ["0000:00:00 00:00:00", "    :  :     :  :  ", "2024:13:45 99:99:99", "yesterday", 7])
def test_what_is_no_date_is_empty(tmp_path: Path, taken: Any) -> None:
    found = metadata_of(save(tmp_path / "a.jpg", exif=exif(taken=taken)))
    assert (found.date, found.time, found.camera) == ("", "", "Apple iPhone 12")


@pytest.mark.parametrize(
    "gps", [{}, {1: "N", 2: (48.0, 51.0, 30.0)}, {1: "N", 2: (95.0, 0.0, 0.0), 3: "E", 4: (2.0, 0.0, 0.0)},
            {1: "", 2: (48.0, 0.0, 0.0), 3: "", 4: (2.0, 0.0, 0.0)}],
)  # fmt: skip
def test_what_is_no_position_is_empty(tmp_path: Path, gps: dict[int, Any]) -> None:
    assert metadata_of(save(tmp_path / "a.jpg", exif=exif(gps=gps))).place == ""


@pytest.mark.parametrize(
    ("maker", "model", "expected"),
    [
        ("Canon", "Canon EOS R5", "Canon EOS R5"),
        ("NIKON CORPORATION", "NIKON D90", "NIKON D90"),
        ("Apple", "iPhone 12", "Apple iPhone 12"),
        ("Apple", "", "Apple"),
        ("", "X100", "X100"),
        ("", "", ""),
    ],
)
def test_a_camera_has_its_makers_name_once(maker: str, model: str, expected: str) -> None:
    assert photo_metadata._camera(maker, model) == expected


@settings(deadline=None)
@given(st.data())
def test_damaged_files_have_no_metadata_and_no_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    file = save(tmp_path_factory.mktemp("damaged") / "a.jpg", exif=exif(), xmp=CITY.encode())
    content = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, 700), max_size=8)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert isinstance(metadata_of(file), PhotoMetadata)


def test_missing_files_pipes_and_images_in_shards_have_no_metadata(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    save(tmp_path / "a.jpg", exif=exif())
    assert metadata_of(tmp_path / "gone.jpg") == metadata_of(tmp_path / "pipe.jpg") == PhotoMetadata()
    assert read_metadata(ImageFile(str(tmp_path), "a.jpg", 0, 99)) == PhotoMetadata()


def test_files_are_opened_only_for_a_field_that_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(templates, "read_metadata", lambda file: read.append(file) or PhotoMetadata())
    Template("{alt} {folder} {name}").text(captioned("a.jpg"))
    assert read == []
    Template("{alt} {date} {place}").text(captioned("a.jpg"))
    assert len(read) == 1
