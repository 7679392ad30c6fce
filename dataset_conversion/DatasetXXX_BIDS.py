"""Convert labelled scans of your own, in a BIDS tree or in folders like one, for nnU-Net."""

from nnunet_ssl.conversion.bids import main

if __name__ == "__main__":
    main()
