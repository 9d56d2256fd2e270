"""Files that move, durably: from inbox/ over .finetuned/jobs/ into adapters/ and archive/ (docs/protocol.md)."""
