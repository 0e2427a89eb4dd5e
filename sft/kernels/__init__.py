"""Faster ways to compute a layer, each equal to the plain one. It may import no other room.

forest_attention.py    attention over a pack on a CPU
segment_attention.py   attention over a pack on a GPU
fused_lora.py          LoRA's products and their gradients in one step
fused_layers.py        norms, gated activation and rotation on a GPU
"""
