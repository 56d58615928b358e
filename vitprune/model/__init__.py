"""The one ViT that everything works on (``vit.py``), its configuration, and one adapter file per source."""
