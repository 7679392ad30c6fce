"""Index a corpus of unlabelled brain MRI (FOMO60K and its successors, BIDS, nnssl) for pre-training."""

from nnunet_ssl.conversion.fomo60k import main

if __name__ == "__main__":
    main()
