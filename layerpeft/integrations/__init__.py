"""The only folder that touches what PEFT, transformers and torch.distributed do not promise to keep."""
