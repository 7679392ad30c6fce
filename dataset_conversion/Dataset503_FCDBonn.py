"""Convert the Bonn FCD-II data (OpenNeuro ds004199; FLAIR and T1; epilepsy) for nnU-Net: Dataset503_FCDBonn."""

from nnunet_ssl.conversion.fcd_bonn import main

if __name__ == "__main__":
    main()
