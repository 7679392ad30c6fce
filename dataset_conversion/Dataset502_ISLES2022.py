"""Convert ISLES 2022 (DWI, ADC and FLAIR; acute stroke) for nnU-Net: Dataset502_ISLES2022."""

from nnunet_ssl.conversion.isles2022 import main

if __name__ == "__main__":
    main()
