"""Names of the Hugging Face hub (`org/name`, `org/name@revision`) to local folders; needs the extra [hub]."""

FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]


def resolve(name):
    """The folder of the snapshot in huggingface_hub's cache, downloaded if it is not there (HF_HUB_OFFLINE forbids that)."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name}: no such file or folder; for names of the Hugging Face hub: pip install onebitmerge[hub]") from None
    repo, _, revision = name.partition("@")
    try:
        return snapshot_download(repo, revision=revision or None, allow_patterns=FILES)
    except Exception as error:
        raise FileNotFoundError(f"{name}: no such file or folder, and huggingface_hub cannot get it: {error}") from error
