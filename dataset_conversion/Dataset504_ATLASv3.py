"""Convert ATLAS R3.0 (T1, stroke; the data of ISLES'26) for nnU-Net: Dataset504_ATLASv3."""

from nnunet_ssl.conversion.atlas_v3 import main

if __name__ == "__main__":
    main()
