"""``nnssl_demo``: the whole story, from unlabelled scans to predicted lesions, on synthetic brains."""
