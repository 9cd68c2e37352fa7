"""Tiled TIFF and SVS read directly: compressed tiles by file offset, decoded once, at reduced size where that suffices.

    file.py         bytes at an offset, from several threads
    structure.py    directories and tags, read with suspicion
    layout.py       one pyramid level: where its tiles lie, and what decodes them
    jpeg.py, jpeg2000.py, plain.py      decoders of one tile
    cache.py        decoded tiles, least recently used first to go
    reader.py       the Slide

Whatever is not fully understood raises `NotUnderstood` while the file is opened, and another reader gets it.
"""
