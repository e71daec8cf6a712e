"""Twenty rows that are wrong, each in its own way: the change to a good row, or its bytes, and what is said of it."""

TWENTY = {
    "no key": ({"key": None}, "no key"),
    "no wav": ({"wav": None}, "no wav"),
    "empty transcript": ({"txt": " "}, "txt is empty"),
    "mark": ({"txt": "do<male>"}, "txt holds <male>"),
    "unknown field": ({"gendr": "male"}, "unknown field 'gendr'; did you mean 'gender'?"),
    "gender": ({"gender": "mal"}, "gender 'mal' is none of"),
    "emotion": ({"emotion": "angry"}, "emotion 'angry' is none of"),
    "style": ({"style": "news paper"}, "style 'news paper' is none of"),
    "language": ({"lang": "English"}, "no language code"),
    "duration": ({"duration": -1}, "duration must be more than 0"),
    "span": ({"start": 2, "end": 1}, "end must lie after start"),
    "words": ({"words": [["re", 0, 0.1]]}, "words say"),
    "word times": ({"words": [["do", 0.5, 0.1]]}, "lasts from 0.5 to 0.1"),
    "again": ({"key": "train_000"}, "the key occurs already in line"),
    "json": (b'{"key": "torn', "no JSON"),
    "list": (b"[1, 2]", "the line holds a list"),
    "bytes": (b'{"key": "\xff"}', "is no UTF-8"),
    "gone": ({"wav": "gone.wav"}, "cannot read"),
    "text": ({"wav": "text.wav"}, "it is broken or in no known format"),
    "empty": ({"wav": "empty.wav"}, "it is empty (0 bytes)"),
    "cut": ({"wav": "cut.wav"}, "cut off"),
    "length": ({"duration": 2.5}, "duration is given as 2.5 s"),
    "silent": ({"wav": "silent.wav"}, "silent throughout"),
}
ONLY_CHECKED = {"length", "silent"}
"""Faults that cost nothing but a wrong label: training and inference take the row as it is."""
