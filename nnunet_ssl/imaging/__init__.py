"""Operations on single images that preparation and conversion share: geometry, registration, skull-stripping."""
