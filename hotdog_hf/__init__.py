"""Fine-tune a pretrained image classifier on a folder of photos with the Hugging Face ecosystem."""

__version__ = "0.1.0"
__all__ = ["load_model"]


def __getattr__(name: str) -> object:
    # Imported when first used: a script's --help must not wait for torch.
    if name == "load_model":
        from hotdog_hf.hub import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
