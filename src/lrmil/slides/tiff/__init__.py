"""Tiled TIFF and SVS read directly: compressed tiles by file offset, decoded once, at reduced size where that suffices.

    file.py         bytes at an offset, from several threads
    structure.py    directories and tags, read with suspicion
    layout.py       one pyramid level: where its tiles lie, and what decodes them
    jpeg.py, jpeg2000.py, plain.py      decoders of one tile
    tiles.py        decoded tiles: each decoded once, kept while it is needed
    understand.py   which directories are the levels
    reader.py       the Slide

Whatever is not fully understood raises `NotUnderstood` while the file is opened, and another reader gets it.
"""
