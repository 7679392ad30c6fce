"""Labelled data sets on disk -> nnU-Net's raw folder. A data set is a file; dataset_conversion/ starts them."""
