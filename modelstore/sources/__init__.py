"""What can be saved: safetensors, Hugging Face directories, state dicts, modules, .pt files, Zarr, torch DCP."""
