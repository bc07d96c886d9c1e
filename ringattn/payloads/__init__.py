"""What travels between ranks and is attended to: `base` is the contract, one file per member."""
