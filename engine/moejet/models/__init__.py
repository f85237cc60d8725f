"""Model families. One code path serves every supported model_type; the configuration carries the differences."""
