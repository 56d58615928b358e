"""A small model on small images: a whole build in well under a minute."""

from __future__ import annotations

PROFILE = """\
model:
  name: vit_tiny_patch16_224
  pretrained: false
  args: {{img_size: 32, patch_size: 4, embed_dim: 48, depth: 3, num_heads: 4, num_classes: 3}}
data:
  source: {images}
  calibration: {{images: 48}}
  recovery: {{images: 60}}
input: {{batch: {{min: 1, opt: 2, max: 4}}, image_size: 32}}
budget: {{speedup: 1.5, threads: 1}}
accuracy: {{min_agreement: 2}}
prune:
  tokens: {{levels: 5}}
  heads: {{multiple: 2}}  # fewer parts to export and measure
  mlp: {{multiple: 96}}
search: {{probe_images: 16, holdout_images: 16, evaluations: 8, landings: 1}}
measure: {{max_seconds: 12, relative_half_width: 0.1}}
recover: {{max_steps: 4, batch: 8}}
validation: {{runs: 40, max_seconds: 10, parity_images: 8}}
"""
