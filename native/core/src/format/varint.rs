//! LEB128 and zigzag integers of at most 64 bits; overlong forms are refused.
