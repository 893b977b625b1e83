"""Fine-tune a pretrained image classifier on a folder of photos with the Hugging Face ecosystem."""

__version__ = "0.1.0"
