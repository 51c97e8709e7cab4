"""Sources to save from: safetensors, Hugging Face directories, state dicts, modules, .pt files, Zarr, torch DCP."""
