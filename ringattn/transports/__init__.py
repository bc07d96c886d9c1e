"""How ranks exchange buffers: `base` is the contract, one file a member."""
