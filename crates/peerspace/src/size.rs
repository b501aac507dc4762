//! Sizes as users write them, with errors that say what was wrong and what is right.

use std::fmt;
use std::str::FromStr;

/// A size in bytes, written as a number with an optional K, M, G or T (binary).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// A size that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SizeError {
    /// It is no number with a known unit.
    #[error("{0:?} is no size: write bytes, or a number with K, M, G or T, such as 256M")]
    Malformed(String),
    /// It does not fit into 64 bits.
    #[error("{0:?} is more bytes than can be counted")]
    Overflow(String),
    /// It is zero.
    #[error("a size of zero bytes makes no sense here")]
    Zero,
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(s: &str) -> Result<Size, SizeError> {
        let text = s.trim();
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(SizeError::Malformed(s.into())),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(SizeError::Malformed(s.into()));
        }
        let n: u64 = digits.parse().map_err(|_| SizeError::Overflow(s.into()))?;
        let bytes = n.checked_mul(1 << shift).ok_or_else(|| SizeError::Overflow(s.into()))?;
        if bytes == 0 { Err(SizeError::Zero) } else { Ok(Size(bytes)) }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut n, mut unit) = (self.0, "");
        for u in ["K", "M", "G", "T"] {
            if n == 0 || !n.is_multiple_of(1024) {
                break;
            }
            n /= 1024;
            unit = u;
        }
        write!(f, "{n}{unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [("1", 1), ("4096", 4096), ("64K", 65536), ("256m", 256 << 20), ("3GiB", 3 << 30)] {
            assert_eq!(text.parse(), Ok(Size(bytes)));
        }
        for bytes in [1, 1023, 1024, 4096, 1 << 30, (1 << 40) * 5, (1 << 20) + 1] {
            assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
        for bad in ["", "M", "12X", "-5", "1.5G", "0x10", "1 G", "++"] {
            assert!(matches!(bad.parse::<Size>(), Err(SizeError::Malformed(_))), "{bad}");
        }
        for huge in ["99999999999999999999", "17000000T"] {
            assert!(matches!(huge.parse::<Size>(), Err(SizeError::Overflow(_))), "{huge}");
        }
        assert_eq!("0".parse::<Size>(), Err(SizeError::Zero));
    }
}
