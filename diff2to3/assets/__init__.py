"""3D files in: catalogues of assets, and loading one as a :class:`diff2to3.types.Mesh`."""

from diff2to3.assets.catalogue import AssetFilter, load_asset, open_catalogue, read_ids
from diff2to3.assets.limits import Limits
from diff2to3.assets.load import load_mesh
from diff2to3.assets.records import AssetRecord, Catalogue, FetchOptions
from diff2to3.assets.source import FileSource

__all__ = [
    "AssetFilter",
    "AssetRecord",
    "Catalogue",
    "FetchOptions",
    "FileSource",
    "Limits",
    "load_asset",
    "load_mesh",
    "open_catalogue",
    "read_ids",
]
