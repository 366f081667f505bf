"""From open weights to quantized MLX arrays. Installed and imported as `edger1.quant`."""
