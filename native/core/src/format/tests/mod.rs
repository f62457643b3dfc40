mod headers;
pub(crate) mod table;
