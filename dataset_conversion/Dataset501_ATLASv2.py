"""Convert ATLAS v2.0 (T1, chronic stroke) for nnU-Net: Dataset501_ATLASv2."""

from nnunet_ssl.conversion.atlas_v2 import main

if __name__ == "__main__":
    main()
