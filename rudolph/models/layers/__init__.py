"""Building blocks shared by the models: attention, key/value cache, dropout, LoRA and dtypes."""
