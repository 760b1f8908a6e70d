"""Process reward models: formats (pure) and the engine that runs them."""
