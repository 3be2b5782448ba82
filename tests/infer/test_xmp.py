"""XMP packets are extended without any other change, a person's words stay, and hostile packets are refused at once."""

import codecs
import io
import xml.etree.ElementTree as ET
from itertools import product
from typing import Any, get_args

import pytest
from clock import cpu_seconds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from infer.metadata import xmp
from infer.metadata.xmp import DC, IPTC, OWN, RDF, XmpError, combine, extend, read_texts

OURS = f"{{{OWN}}}"
POLICIES: tuple[xmp.Existing, ...] = get_args(xmp.Existing)
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"


def wrap(inside: str, *, about: str = "", rdf: str = "rdf") -> str:
    """A packet with these elements in rdf:RDF, with fields of other programs, in other forms, and comments."""
    return f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\r
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2"><!-- a > comment -->
 <{rdf}:RDF xmlns:{rdf}="{RDF}" xmlns:d="{DC}">
  <{rdf}:Description {rdf}:about="{about}" xmlns:darktable="http://darktable.sf.net/"
     darktable:history_end='3 > "2"' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="4">
   <darktable:mask><{rdf}:Seq><{rdf}:li>a</{rdf}:li><{rdf}:li darktable:x="1"/></{rdf}:Seq></darktable:mask>
  </{rdf}:Description>
  {inside}
 </{rdf}:RDF>
</x:xmpmeta>
<?xpacket end="w"?>{" " * 50}\n"""


def description(text: str, *, name: str = "d:description") -> str:
    return (
        f'<rdf:Description rdf:about=""><{name}><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li>'
        f'<rdf:li xml:lang="de">Deutsch</rdf:li></rdf:Alt></{name}></rdf:Description>'
    )


def extended(packet: bytes | None, text: str = "A cat.", **options: Any) -> bytes:
    found = extend(packet, text, model="m", date="2026-11-28", **options)
    assert found is not None
    return found


def others(element: ET.Element) -> list[Any]:
    """An element without the fields that we write, and without the block that we add."""
    own = (f"{{{DC}}}description", f"{{{IPTC}}}AltTextAccessibility")
    kept = [child for child in element if child.tag not in own and not any(each.tag.startswith(OURS) for each in child)]
    attributes = {name: value for name, value in element.attrib.items() if name not in own}
    return [element.tag, attributes, (element.text or "").strip(), [others(child) for child in kept]]


def texts_by_language(packet: bytes) -> dict[str, str | None]:
    tree = ET.fromstring(packet)
    return {li.get(XML_LANG, ""): li.text for li in tree.iterfind(f".//{{{DC}}}description//{{{RDF}}}li")}


ENCODINGS = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16": lambda text: codecs.BOM_UTF16_LE + text.replace("\ufeff", "").encode("utf-16-le"),
    "utf-16 big-endian": lambda text: codecs.BOM_UTF16_BE + text.replace("\ufeff", "").encode("utf-16-be"),
    "latin-1": lambda text: (
        b'<?xml version="1.0" encoding="ISO-8859-1"?>' + text.replace("\ufeff", "").encode("latin-1")
    ),
    "utf-8 with zeros at the end": lambda text: text.encode() + bytes(7),
}


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("rdf", ["rdf", "r"])
def test_without_a_description_only_a_block_is_inserted(name: str, rdf: str) -> None:
    packet = ENCODINGS[name](wrap("<!-- é -->", rdf=rdf, about="uuid:1&amp;2"))
    new = extended(packet, "A cät & <dog> \U0001f600\nsits.")
    start = next(at for at in range(len(packet)) if packet[at] != new[at])
    end = start + len(new) - len(packet)
    assert new[:start] + new[end:] == packet
    assert read_texts(new) == ["A cät & <dog> \U0001f600\nsits."] * 2
    assert extend(new, "A cät & <dog> \U0001f600\nsits.", model="other", date="tomorrow") is None


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip))
def test_any_text_survives_and_a_newer_one_of_ours_replaces_it(first: str, second: str) -> None:
    allowed = [xmp._NOT_XML.sub("\ufffd", text).strip().replace("\r\n", "\n") for text in (first, second)]
    packet = extended(None, first)
    assert [text.replace("\r\n", "\n") for text in read_texts(packet)] == [allowed[0]] * 2
    newer = extend(packet, second, model="better", date="2027-01-01") or packet
    assert [text.replace("\r\n", "\n") for text in read_texts(newer)] == [allowed[1]] * 2
    assert newer.count(b"rdf:li") == packet.count(b"rdf:li")


FORMS = {
    "languages": description("Mine"),
    "other prefix": f'<rdf:Description rdf:about="">{xmp._element(xmp.DESCRIPTION, "Mine")}</rdf:Description>',
    "attribute": '<rdf:Description rdf:about="" d:description="Mine"/>',
    "attribute in quotes": "<rdf:Description d:description='Mine' rdf:about=''></rdf:Description>",
    "plain": "<rdf:Description><d:description>Mine</d:description></rdf:Description>",
    "only German": '<rdf:Description><d:description><rdf:Alt><rdf:li xml:lang="de">Mine</rdf:li></rdf:Alt>'
    "</d:description></rdf:Description>",
    "with qualifiers": '<rdf:Description><d:description rdf:parseType="Resource"><rdf:value>Mine</rdf:value>'
    "</d:description></rdf:Description>",
    "in parts": "<rdf:Description><d:description><rdf:Alt><rdf:li>Mi<![CDATA[n]]>e</rdf:li></rdf:Alt></d:description>"
    "</rdf:Description>",
    "after an empty one": f'<rdf:Description d:description=""/>{description("Mine")}',
}


@pytest.mark.parametrize(("form", "existing"), list(product(FORMS, POLICIES)))
def test_a_persons_description_stays_unless_it_is_to_change(form: str, existing: xmp.Existing) -> None:
    packet = wrap(FORMS[form]).encode()
    new = extended(packet, existing=existing)
    expected = {"keep": "Mine", "append": "Mine\nA cat.", "prepend": "A cat.\nMine", "overwrite": "A cat."}
    assert read_texts(new) == [expected[existing], "A cat."]
    assert others(ET.fromstring(new)) == others(ET.fromstring(packet))
    assert extend(new, "A cat.", model="m", date="later", existing=existing) is None
    newer = extended(new, "A dog.", existing=existing)
    assert read_texts(newer) == [expected[existing].replace("A cat.", "A dog."), "A dog."]
    assert b"A cat." not in newer


def test_other_languages_stay_but_when_all_is_overwritten() -> None:
    packet = wrap(description("Mine")).encode()
    assert texts_by_language(extended(packet, existing="append")) == {"x-default": "Mine\nA cat.", "de": "Deutsch"}
    assert texts_by_language(extended(packet, existing="overwrite")) == {"x-default": "A cat."}


def test_what_a_person_made_of_our_text_is_theirs() -> None:
    ours = extended(None)
    changed = ours.replace(b">A cat.</rdf:li></rdf:Alt></dc", b">My cat.</rdf:li></rdf:Alt></dc")
    assert read_texts(changed) == ["My cat.", "A cat."]
    assert read_texts(extended(changed, "A dog.")) == ["My cat.", "A dog."]
    assert extend(changed, "A cat.", model="m", date="d", existing="append") is None
    assert read_texts(extended(changed, "A dog.", existing="append")) == ["My cat.\nA dog.", "A dog."]


def test_lines_are_added_to_a_text_that_was_kept_before() -> None:
    """As only the other field has the caption, so nobody has changed what was written into this one."""
    packet = wrap(description("Mine")).encode()
    kept = extended(packet)
    assert read_texts(kept) == ["Mine", "A cat."]
    for existing, text in (("append", "Mine\nA cat."), ("prepend", "A cat.\nMine")):
        added = extended(kept, existing=existing)
        assert read_texts(added) == [text, "A cat."]
        assert extend(added, "A cat.", model="m", date="later", existing=existing) is None
        assert read_texts(extended(added, "A dog.")) == [text.replace("A cat.", "A dog."), "A dog."]


@pytest.mark.parametrize("persons", ["A cat.", "Our Tom\nA cat."])
def test_a_persons_text_that_says_the_same_stays_theirs(persons: str) -> None:
    packet = wrap(description(persons)).encode()
    first = extended(packet)
    assert read_texts(first) == [persons, "A cat."]
    assert read_texts(extended(first, "A dog.")) == [persons, "A dog."]


def test_a_description_outside_of_xmp_counts() -> None:
    assert read_texts(extended(None, elsewhere="Mine")) == ["A cat."]  # the alternative text
    assert read_texts(extended(None, elsewhere="Mine", existing="append")) == ["Mine\nA cat.", "A cat."]
    ours = extended(None)
    assert extend(ours, "A cat.", model="m", date="d", elsewhere="A cat.") is None  # another program has copied ours
    assert read_texts(extended(ours, "A dog.", elsewhere="A cat.")) == ["A dog.", "A dog."]


@pytest.mark.parametrize("empty", ["<d:description/>", "<d:description></d:description>",
    "<d:description><rdf:Alt><rdf:li xml:lang='x-default'/></rdf:Alt></d:description>"])  # fmt: skip
def test_an_empty_description_is_none(empty: str) -> None:
    packet = wrap(f"<rdf:Description>{empty}</rdf:Description>").encode()
    assert read_texts(packet) == []
    assert read_texts(extended(packet)) == ["A cat.", "A cat."]
    assert extended(packet).count(b"description ") == 1


@pytest.mark.parametrize("rdf", [f'<rdf:RDF xmlns:rdf="{RDF}"/>', f'<rdf:RDF xmlns:rdf="{RDF}" />'])
def test_a_packet_without_fields_gets_some(rdf: str) -> None:
    assert read_texts(extended(f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{rdf}</x:xmpmeta>'.encode())) == ["A cat."] * 2
    assert read_texts(extended(rdf.encode())) == ["A cat."] * 2


def test_what_made_the_text_is_in_our_own_namespace() -> None:
    found = ET.fromstring(extended(None))
    assert [found.findtext(f".//{{{OWN}}}{name}") for name in ("Text", "Model", "Date")] == [
        "A cat.",
        "m",
        "2026-11-28",
    ]


def test_pillow_reads_it() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", xmp=extended(None))
    found = Image.open(buffer).getxmp()["xmpmeta"]["RDF"]["Description"]
    assert found["description"]["Alt"]["li"]["text"] == found["AltTextAccessibility"]["Alt"]["li"]["text"] == "A cat."


BOMB = "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
HOSTILE = {
    "entities": f'<!DOCTYPE x [<!ENTITY a "ha">{BOMB}]>{wrap("&j;")}'.encode(),
    "a file": f'<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>{wrap(description("&a;"))}'.encode(),
    "an external type": f'<!DOCTYPE x SYSTEM "http://localhost:1/x.dtd">{wrap("")}'.encode(),
    "cut off": wrap(description("Mine")).encode()[:700],
    "no XML": b"\x89PNG\r\n",
    "empty": b"",
    "no XMP": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "wrong bytes": wrap("").encode().replace(b"comment", b"\xff\xfe"),
    "an unknown encoding": b'<?xml version="1.0" encoding="zip"?>' + wrap("")[1:].encode(),
    "too large": wrap("").encode() + b" " * xmp.MAX_BYTES,
    "an undeclared prefix": wrap("<rdf:Description><nobody:x/></rdf:Description>").encode(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_packet_is_refused(kind: str) -> None:
    with pytest.raises(XmpError):
        read_texts(HOSTILE[kind])
    with pytest.raises(XmpError):
        extend(HOSTILE[kind], "A cat.", model="m", date="d")


PREFIX = "p" * 4_000_000
LARGE = {
    "deep": "<a>" * 500_000 + "</a>" * 500_000,
    "many properties": description("Mine" * 10) * 20_000,
    "many languages": description("</rdf:li><rdf:li>".join(["x"] * 200_000)) + description("y") * 1_000,
    "a long prefix": f'<{PREFIX}:Description xmlns:{PREFIX}="{RDF}"/>',
    "a long attribute": f"<rdf:Description d:description='{'&lt;' * 2_000_000}'/>",
    "many attributes": "<rdf:Description " + " ".join(f"d:a{number}=''" for number in range(200_000)) + "/>",
    "a long text": f"<rdf:Description><d:description>{'x &amp; y ' * 900_000}</d:description></rdf:Description>",
}


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_packet_takes_seconds_at_most(kind: str) -> None:
    packet = wrap(LARGE[kind]).encode()
    assert len(packet) <= xmp.MAX_BYTES
    assert cpu_seconds(lambda: read_texts(packet), num_tries=1) < 10


def test_combining_again_changes_nothing() -> None:
    for before, existing in product(("", "Mine", "Mine\nold", "old\nMine"), POLICIES):
        once = combine(before, "new", earlier="old", existing=existing)
        assert combine(once, "new", earlier="new", existing=existing) == once
