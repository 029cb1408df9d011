"""A feature encoder that reads the raw bytes of any modality through cross-attention."""
