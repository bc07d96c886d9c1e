"""How tiles are computed on a device: `base` is the contract, one file a member; `choice` picks one."""
