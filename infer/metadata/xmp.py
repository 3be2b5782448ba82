"""Reads and extends XMP packets, which hold an image's metadata: in a sidecar, or in the image itself.

A packet is never serialised again. Expat says at which byte each value is, and only the bytes of the changed values are
replaced. So all other fields, namespaces, prefixes, comments and the encoding stay as they are.

A caption goes into two fields: `dc:description`, and `Iptc4xmpCore:AltTextAccessibility`, the text for people who do
not see the image. Others, of our own namespace, say which text this program wrote (`captioner:Text`), into which of the
two fields, with which model, on which day, and of which file (its SHA-256 when it was captioned). A field whose text is
still that one is ours, and a newer caption replaces it. Any other text is a person's, and so is one that this program
wrote for a person, who corrected the model's.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal
from xml.parsers import expat
from xml.sax.saxutils import escape

Existing = Literal["keep", "append", "prepend", "overwrite"]  # what happens to a person's text

PERSON = "a person"  # in place of a model's id
MAX_SOURCES = 8  # files of which a text was written: as a text is embedded, the file becomes another one
MAX_BYTES = 1 << 24  # of a packet; the largest ones are of darktable, with drawn masks
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
IPTC = "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/"
PHOTOSHOP = "http://ns.adobe.com/photoshop/1.0/"
OWN = "urn:captioner:xmp:1#"
DESCRIPTION, ALT_TEXT = f"{DC} description", f"{IPTC} AltTextAccessibility"
OWN_TEXT, OWN_FIELDS = f"{OWN} Text", f"{OWN} Fields"
OWN_MODEL, OWN_DATE, OWN_SOURCE = f"{OWN} Model", f"{OWN} Date", f"{OWN} Source"
FIELDS = (DESCRIPTION, ALT_TEXT)
PLACE = (f"{PHOTOSHOP} City", f"{PHOTOSHOP} Country")
PREFIXES = {DC: "dc", IPTC: "Iptc4xmpCore", OWN: "captioner"}

EMPTY = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="{RDF}">
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
""".encode()

_WANTED = frozenset((*FIELDS, *PLACE, OWN_TEXT, OWN_FIELDS, OWN_MODEL, OWN_DATE, OWN_SOURCE))
_LANG = "http://www.w3.org/XML/1998/namespace lang"
_TAG = re.compile(rb"""<(?:[^"'>]|"[^"]*"|'[^']*')*>""")
_TAG_NAME = re.compile(rb"<[^\s/>]+")
_ATTRIBUTE = re.compile(rb"""\s+([^\s=]+)\s*=\s*("[^"]*"|'[^']*')""")
_DECLARED = re.compile(rb"""^<\?xml[^>]*?\sencoding\s*=\s*["']([A-Za-z0-9._-]+)["']""")
_ENCODINGS = {"utf-8": "utf-8", "us-ascii": "ascii", "iso-8859-1": "latin-1"}  # besides UTF-16, which has a mark
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_IN_TEXT = {"\r": "&#13;"}
_IN_ATTRIBUTE = _IN_TEXT | {'"': "&quot;", "'": "&apos;", "\n": "&#10;", "\t": "&#9;"}


class XmpError(Exception):
    """A packet that cannot be read, and is left as it is."""


@dataclass(kw_only=True, slots=True)
class Value:
    """A text, and where it is: bytes [start, end) of the packet in UTF-8."""

    text: str
    lang: str
    start: int
    end: int


@dataclass(kw_only=True, slots=True)
class Property:
    """A property of the image: bytes [start, end) of the packet, an element or the quoted value of an attribute.

    `text` is that of the element's `value` in the default language, else of the first one with a text, else all its
    text.
    """

    name: str
    text: str
    start: int
    end: int
    is_attribute: bool = False
    value: Value | None = None


def read_texts(packet: bytes) -> list[str]:
    """The description and the alternative text of a packet, those that exist. Raises XmpError."""
    return _read(packet, FIELDS)


def read_place(packet: bytes) -> list[str]:
    """The city and the country of a packet, those that exist. Raises XmpError."""
    return _read(packet, PLACE)


def read_sources(packet: bytes) -> list[str]:
    """The SHA-256 of the file of which this program wrote the text, last, and of earlier ones. Raises XmpError."""
    return "".join(_read(packet, [OWN_SOURCE])).split()


def _read(packet: bytes, names: Iterable[str]) -> list[str]:
    found = _parse(_to_utf8(packet)[0])
    return [text for name in names if (text := found.text(name))]


def extend(
    packet: bytes | None,
    text: str,
    *,
    model: str,
    date: str,
    sha256: str = "",
    existing: Existing = "keep",
    elsewhere: str = "",
) -> bytes | None:
    """The packet with `text` as the description and the alternative text; None if nothing is to change.

    Without a packet it is a new one. A person's text is kept, or `text` becomes a line after it, before it, or replaces
    it. With PERSON as the model `text` is a person's, which a later model's never replaces unless `existing` is
    "overwrite"; "" empties what a model wrote. `elsewhere` is the description that the image has outside of XMP; it
    counts if the packet has none. `sha256` is that of the captioned file. Raises XmpError.
    """
    source, encoding, padding = _to_utf8(EMPTY if packet is None else packet)
    found = _parse(source)
    text = _NOT_XML.sub("\ufffd", text).strip()
    is_corrected = found.text(OWN_MODEL) == PERSON and model != PERSON
    if is_corrected and existing == "keep":
        return None
    own_text = "" if is_corrected else found.text(OWN_TEXT)
    own_fields = found.text(OWN_FIELDS).split(",")
    changed, written = {}, []
    for name in FIELDS:
        earlier = own_text if name.split()[1] in own_fields else ""
        before = found.text(name) or (elsewhere if name == DESCRIPTION and elsewhere != earlier else "")
        after = combine(before, text, earlier=earlier, existing=existing)
        if after not in (before, found.text(name)):
            changed[name] = after
        if name in changed or (earlier and has_lines(after, text)):
            written.append(name.split()[1])
    if not changed:
        return None
    changed |= {
        OWN_TEXT: text,
        OWN_FIELDS: ",".join(written),
        OWN_MODEL: model,
        OWN_DATE: date,
        OWN_SOURCE: _sources(found, sha256),
    }
    edits = [found.edit(name, value, whole=existing == "overwrite") for name, value in changed.items() if name in found]
    new = {name: value for name, value in changed.items() if name not in found}
    if new:
        edits.append(found.edit_to_add(new))
    for start, end, replacement in sorted(edits, reverse=True):
        source = source[:start] + replacement + source[end:]
    return source.decode().encode(encoding, errors="xmlcharrefreplace") + padding


def _sources(found: "_Packet", sha256: str) -> str:
    """The last sources of a packet, with this one."""
    return " ".join([*dict.fromkeys([*found.text(OWN_SOURCE).split(), sha256])][-MAX_SOURCES:])


def combine(before: str, text: str, *, earlier: str, existing: Existing) -> str:
    """The new text of a field that has the text `before`, if `earlier` is what this program wrote last."""
    if before in ("", earlier) or existing == "overwrite":
        return text
    if earlier and before.endswith(f"\n{earlier}"):
        return (before.removesuffix(earlier) + text).strip("\n")
    if earlier and before.startswith(f"{earlier}\n"):
        return (text + before.removeprefix(earlier)).strip("\n")
    if existing == "keep" or text in ("", earlier) or has_lines(before, text):  # or a person changed what was written
        return before
    return f"{before}\n{text}" if existing == "append" else f"{text}\n{before}"


def has_lines(content: str, lines: str) -> bool:
    """Whether a text has all these lines, one after the other."""
    one, other = ("\n".join(text.splitlines()) for text in (content, lines))
    return f"\n{other}\n" in f"\n{one}\n"


# ---- parsing ----------------------------------------------------------------------------------------------


def _to_utf8(packet: bytes) -> tuple[bytes, str, bytes]:
    """The packet in UTF-8, its own encoding, and the zero bytes at its end. Raises XmpError."""
    if len(packet) > MAX_BYTES:
        raise XmpError(f"more than {MAX_BYTES:,} bytes")
    encoding = "utf-8"
    if packet.startswith(codecs.BOM_UTF16_LE):
        encoding = "utf-16-le"
    elif packet.startswith(codecs.BOM_UTF16_BE):
        encoding = "utf-16-be"
    elif declared := _DECLARED.match(packet):
        encoding = _ENCODINGS.get(declared[1].decode().lower(), "")
        if not encoding:
            raise XmpError(f"its encoding is {declared[1].decode()}")
    content = packet if encoding.startswith("utf-16") else packet.rstrip(b"\0")
    try:
        return content.decode(encoding).encode(), encoding, packet[len(content) :]
    except UnicodeDecodeError as error:
        raise XmpError(f"it is not {encoding}") from error


def _parse(source: bytes) -> "_Packet":
    found = _Packet(source)
    found.parse()
    return found


class _Packet:
    """The wanted properties of a packet in UTF-8, and where new ones can be added."""

    def __init__(self, source: bytes) -> None:
        self._source = source
        self._properties: dict[str, Property] = {}
        self._about = ""
        self._rdf: tuple[int, int] | None = None  # of the end tag of rdf:RDF, or of the whole empty element
        self._path: list[str] = []
        self._level = 0  # of rdf:RDF, while inside
        self._open: Property | None = None
        self._values: list[Value] = []  # of the open property
        self._value: Value | None = None
        self._value_level = 0
        self._texts: list[str] = []  # of the open property
        self._num_before = 0  # of these, before the open value
        self._expat = expat.ParserCreate("utf-8", " ")

    def __contains__(self, name: str) -> bool:
        return name in self._properties

    def text(self, name: str) -> str:
        """A property's text; "" without one."""
        return self._properties[name].text if name in self._properties else ""

    # ---- events of the parser

    def parse(self) -> None:
        """Find the properties. Raises XmpError."""
        parser = self._expat
        parser.ordered_attributes = parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse  # so there are no entities either
        parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
        parser.CharacterDataHandler = self._add_text
        try:
            parser.Parse(self._source, True)
        except expat.ExpatError as error:
            raise XmpError(str(error)) from error
        if self._rdf is None:
            raise XmpError("there is no rdf:RDF in it")

    def _refuse(self, *_: object) -> None:
        raise XmpError("it has a DOCTYPE")

    def _start(self, name: str, attributes: Sequence[str]) -> None:
        start = self._expat.CurrentByteIndex
        self._path.append(name)
        depth = len(self._path) - self._level
        if not self._level:
            if name == f"{RDF} RDF" and not self._rdf:
                self._level, self._rdf = len(self._path), (start, self._end_of_tag(start))
        elif depth == 1 and name == f"{RDF} Description":
            self._read_attributes(start, attributes)
        elif depth == 2 and name in _WANTED and self._path[self._level] == f"{RDF} Description":
            self._open = Property(name=name, text="", start=start, end=self._end_of_tag(start))
        elif self._open and name == f"{RDF} li" and self._value is None:
            lang = dict(zip(attributes[::2], attributes[1::2], strict=True)).get(_LANG, "")
            self._value = Value(text="", lang=lang, start=self._end_of_tag(start), end=0)
            self._value_level, self._num_before = len(self._path), len(self._texts)

    def _read_attributes(self, start: int, attributes: Sequence[str]) -> None:
        """Find the properties that are attributes of an rdf:Description."""
        sources = self._own_attributes(start)
        for name, value, (first, end) in zip(attributes[::2], attributes[1::2], sources, strict=True):
            if name == f"{RDF} about":
                self._about = self._about or value
            elif name in _WANTED:
                self._keep(Property(name=name, text=value.strip(), start=first, end=end, is_attribute=True))

    def _own_attributes(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield where the quoted values of a start tag's attributes are, without declarations of namespaces."""
        name = _TAG_NAME.match(self._source, start)
        end = name.end() if name else start
        while attribute := _ATTRIBUTE.match(self._source, end):
            end = attribute.end()
            if attribute[1] != b"xmlns" and not attribute[1].startswith(b"xmlns:"):
                yield attribute.span(2)

    def _add_text(self, text: str) -> None:
        if self._open:
            self._texts.append(text)

    def _end(self, _name: str) -> None:
        end = self._expat.CurrentByteIndex
        depth = len(self._path) - self._level
        if self._value and len(self._path) == self._value_level:
            value, self._value = self._value, None
            value.text, value.end = "".join(self._texts[self._num_before :]).strip(), end
            if value.text:
                self._values.append(value)
        elif self._open and depth == 2:
            found, values, self._open, self._values = self._open, self._values, None, []
            found.value = next((value for value in values if value.lang == "x-default"), next(iter(values), None))
            found.text = found.value.text if found.value else "".join(self._texts).strip()
            if not self._is_empty_element(found.end):
                found.end = self._end_of_tag(end)
            self._texts = []
            self._keep(found)
        elif self._rdf and self._level and depth == 0:
            self._level = 0
            if not self._is_empty_element(self._rdf[1]):
                self._rdf = (end, self._end_of_tag(end))
        self._path.pop()

    def _keep(self, found: Property) -> None:
        """Keep the property, the first one with a text if there are several."""
        if not self.text(found.name):
            self._properties[found.name] = found

    def _is_empty_element(self, end_of_tag: int) -> bool:
        """Whether a start tag that ends here is that of an empty element, which has no end tag."""
        return self._source[end_of_tag - 2 : end_of_tag] == b"/>"

    def _end_of_tag(self, start: int) -> int:
        tag = _TAG.match(self._source, start)
        assert tag is not None  # expat has accepted it
        return tag.end()

    # ---- edits: (start, end, replacement)

    def edit(self, name: str, text: str, *, whole: bool) -> tuple[int, int, bytes]:
        """The edit that gives an existing property this text; `whole`: in no other language either."""
        found = self._properties[name]
        if found.is_attribute:
            return found.start, found.end, f'"{escape(text, _IN_ATTRIBUTE)}"'.encode()
        value = found.value
        if value is None or whole or b"<" in self._source[value.start : value.end]:
            return found.start, found.end, _element(name, text).encode()
        return value.start, value.end, escape(text, _IN_TEXT).encode()

    def edit_to_add(self, texts: dict[str, str]) -> tuple[int, int, bytes]:
        """The edit that adds properties, in an rdf:Description at the end of rdf:RDF."""
        assert self._rdf is not None
        start, end = self._rdf
        about = escape(self._about, _IN_ATTRIBUTE)
        elements = "".join(f"\n   {_element(name, text)}" for name, text in texts.items())
        block = f' <rdf:Description xmlns:rdf="{RDF}" rdf:about="{about}">{elements}\n  </rdf:Description>\n '.encode()
        tag = self._source[start:end]
        if tag.startswith(b"</"):
            return start, start, block
        name = re.split(rb"[\s/]", tag[1:], maxsplit=1)[0]  # an empty element, which gets an end tag
        return start, end, tag[: tag.rindex(b"/")] + b">\n" + block + b"</" + name + b">"


def _element(name: str, text: str) -> str:
    """A property as an element that declares its own prefixes."""
    namespace, local = name.split(" ")
    tag = f"{PREFIXES[namespace]}:{local}"
    content = escape(text, _IN_TEXT)
    if name in FIELDS:
        content = f'<rdf:Alt xmlns:rdf="{RDF}"><rdf:li xml:lang="x-default">{content}</rdf:li></rdf:Alt>'
    return f'<{tag} xmlns:{PREFIXES[namespace]}="{namespace}">{content}</{tag}>'
