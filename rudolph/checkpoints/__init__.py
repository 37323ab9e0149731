"""Released checkpoints: their table, download, safe reading and conversion to safetensors."""
