"""Saving a loaded model as a folder, and sharing it on the Hugging Face hub, by the conventions of huggingface_hub's
ModelHubMixin: ``from_pretrained``, ``save_pretrained``, ``push_to_hub``, and a model card that says which library loads
the model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diff2to3.checkpoint import MODEL_FILE, BundleInfo, read_bundle
from diff2to3.errors import InputError, MissingDependencyError
from diff2to3.hub import Source

CARD = "README.md"
#: Licences as bundles name them → identifiers of the hub.
LICENSES = {"MIT": "mit", "Apache-2.0": "apache-2.0", "CC0-1.0": "cc0-1.0"}


class Shareable:
    """A model that remembers the bundle it was loaded from; ``source`` is None for one put together in memory."""

    source: Source | None = None

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> Path:
        """Save the model as a bundle: ``model.json``, one safetensors file per network, licences, and a model card.

        The weights are those of the bundle that the model was loaded from; what ``to`` changed is not part of them.

        Args:
            save_directory: a new or empty folder.
            repo_id, push_to_hub: also upload the folder to this repository.
            options: of :meth:`push_to_hub`.

        Returns:
            The folder.

        Raises:
            InputError: the folder is not empty or cannot be written to, or the model was not loaded from a bundle.
        """
        folder = Path(save_directory).expanduser()
        save_bundle_of(self.source, folder)
        if push_to_hub:
            upload(folder, repo_id or folder.name, **options)
        return folder

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face hub; returns the address of the commit.

        Args:
            repo_id: owner/name. The repository is made if it is missing.
            options: ``commit_message``, ``private``, ``token``, ``branch``, as huggingface_hub takes them.

        Raises:
            InputError: the model was not loaded from a bundle, or the hub refuses the upload.
            MissingDependencyError: huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            save_bundle_of(self.source, Path(folder))
            return upload(Path(folder), repo_id, **options)


def save_bundle_of(source: Source | None, folder: Path) -> None:
    """Copy the bundle at ``source`` to ``folder``, with a model card that the hub understands."""
    if source is None:
        raise InputError(
            "save_pretrained: this model was not loaded from a bundle, so there is nothing to copy"
        )
    if source.folder is not None and not source.has(MODEL_FILE):
        raise InputError(
            f"{source.name}: not a bundle of ours (no {MODEL_FILE}); diff2to3 models convert makes one of it"
        )
    path = source.file(MODEL_FILE)
    info = read_bundle(path.parent)
    names = [MODEL_FILE, *(entry.file for entry in info.networks.values())]
    files = {name: source.file(name) for name in names}
    extras = [f for f in path.parent.iterdir() if f.name.startswith(("LICENSE", "NOTICE")) and f.is_file()]
    card = path.parent / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder}: the folder is not empty; name a new one")
        for name, file in {**files, **{f.name: f for f in extras}}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / name)
        (folder / CARD).write_text(model_card(info, text, Path(source.name).name), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror or error}") from error


def model_card(info: BundleInfo, text: str, name: str) -> str:
    """A bundle's README with the header that the hub reads; as it is where it has a header."""
    if text.startswith("---\n"):
        return text
    license = LICENSES.get(info.license, "other")
    header = ["---", "library_name: diff2to3", "pipeline_tag: image-to-3d", f"license: {license}"]
    if license == "other" and info.license:
        header.append(f"license_name: {info.license.lower().replace(' ', '-')}")
    header += ["tags:", "- 3d-gaussian-splatting", "- flow-matching", "---", ""]
    usage = (
        "```python\nfrom diff2to3 import ImageTo3D\n\n"
        'ImageTo3D.from_pretrained("REPOSITORY")("photo.png").save("asset.ply")\n```\n'
    )
    return "\n".join(header) + (text or f"# {name}\n\n{usage}")


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str = "Push model with diff2to3",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
) -> str:
    """A folder to a repository of the hub; returns the address of the commit."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingDependencyError("huggingface_hub", hint="pip install huggingface_hub") from error
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=repo_id, folder_path=os.fspath(folder), commit_message=commit_message, revision=branch
        )
    except Exception as error:  # the library's errors have no common base and change between versions
        raise InputError(f"{repo_id}: cannot be uploaded to: {error}") from error
    return str(getattr(found, "commit_url", found))
