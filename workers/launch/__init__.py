"""The launcher behind `windlass train`: one coordinator, S shards and W workers on this host."""
