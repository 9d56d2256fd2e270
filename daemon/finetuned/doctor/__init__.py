"""`finetuned doctor`: whether this machine and this base directory are fit for training. One function a check."""
