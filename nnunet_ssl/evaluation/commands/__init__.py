"""The subcommands of ``nnssl_evaluate``."""
