"""Recognises the texts that cameras and programs write by themselves where a person's description could be.

Only whole texts of known forms, with their capitals, so that a person's words are none of them.
"""

import re

MAKERS = (
    "AGFA|BENQ|CANON|CASIO|EPSON|FUJIFILM|GE|HP|KODAK|KONICA|KONICA MINOLTA|KYOCERA|LEICA|LG|MINOLTA|NIKON|OLYMPUS|"
    "PANASONIC|PENTAX|POLAROID|RICOH|SAMSUNG|SANYO|SONY|TOSHIBA|VIVITAR"
)
FORMS = (
    rf"(?:(?:{MAKERS}) )?DIGITAL (?:STILL )?CAMERA",
    "(?:KODAK )?Digital Still ?Camera|DigitalCamera|SONY DSC|SAMSUNG(?: CAMERA PICTURES)?|default",
    r"Camera \d+\.\d+|Exif[_ ]JPEG(?:_\w+)?|(?:[A-Z]:)?[\\/]?DCIM[\\/]\S+|Created by dji camera",
    "<(?:Digimax|KENOX|Kenox|Samsung|SAMSUNG|VLUU)[^<>]*>",
    "(?:oz)?(?:nor|edf)|r?hdr|hdrpl|vhdr|dav|cof|sdr|mde|ptr|rbt|fbt|cbt|btf|nfh|maf",  # how a Huawei took it
    r"Screenshot|oplus_\d+|\{.*\}|filter: ?-?\d+;.*|METADATA-START.*",  # of phones
    r"Processed with (?:VSCO|MOLDIV)\w*(?: with \w+ preset)?|Created with (?:The )?GIMP(?: on a Mac)?",
    r".*\bSteps: \d+, Sampler: .*",  # settings of image generators
)
_AUTOMATIC = re.compile("|".join(FORMS), re.DOTALL)


def is_automatic(text: str) -> bool:
    """Whether a camera or a program wrote this text by itself."""
    return bool(_AUTOMATIC.fullmatch(text))
