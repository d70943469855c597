//! Integer arithmetic with its flags, of 1, 2 or 4 bytes (SDM vol. 1, §3.4.3.1).

use x86::registers::rflags;

/// The bits of an operand.
pub(super) fn mask(size: usize) -> u64 {
    (1 << (8 * size.min(4) as u32)) - 1
}

/// SF, ZF and PF of a result.
fn of_result(value: u64, size: usize) -> u64 {
    let value = value & mask(size);
    let sign = value >> (8 * size as u32 - 1) & 1;
    u64::from((value as u8).count_ones().is_multiple_of(2)) << 2
        | u64::from(value == 0) << 6
        | sign << 7
}

/// `a + b + carry`.
pub(super) fn add(a: u64, b: u64, carry: u64, size: usize) -> (u64, u64) {
    let (a, b, m) = (a & mask(size), b & mask(size), mask(size));
    let sum = a + b + carry;
    let top = 8 * size as u32 - 1;
    let overflow = ((a ^ sum) & (b ^ sum)) >> top & 1;
    let flags = u64::from(sum > m) | (a ^ b ^ sum) & rflags::AF | overflow << 11;
    (sum & m, flags | of_result(sum, size))
}

/// `a - b - borrow`.
pub(super) fn subtract(a: u64, b: u64, borrow: u64, size: usize) -> (u64, u64) {
    let (a, b, m) = (a & mask(size), b & mask(size), mask(size));
    let result = a.wrapping_sub(b).wrapping_sub(borrow);
    let top = 8 * size as u32 - 1;
    let overflow = ((a ^ b) & (a ^ result)) >> top & 1;
    let flags = u64::from(b + borrow > a) | (a ^ b ^ result) & rflags::AF | overflow << 11;
    (result & m, flags | of_result(result, size))
}

/// A result of AND, OR, XOR or TEST.
pub(super) fn logic(value: u64, size: usize) -> (u64, u64) {
    (value & mask(size), of_result(value, size))
}

/// Quotient and remainder of `high:low` by `by`; `None` where that is #DE (SDM vol. 2,
/// DIV and IDIV). Flags are undefined.
pub(super) fn divide(
    high: u64,
    low: u64,
    by: u64,
    size: usize,
    signed: bool,
) -> Option<(u64, u64)> {
    let (bits, m) = (8 * size as u32, mask(size));
    let dividend = (high & m) << bits | low & m;
    if signed {
        let dividend = i128::from((dividend << (64 - 2 * bits)) as i64 >> (64 - 2 * bits));
        let by = i128::from((by << (64 - bits)) as i64 >> (64 - bits));
        let (quotient, remainder) = (dividend.checked_div(by)?, dividend.checked_rem(by)?);
        let limit = 1_i128 << (bits - 1);
        let fits = (-limit..limit).contains(&quotient);
        fits.then_some((quotient as u64 & m, remainder as u64 & m))
    } else {
        let by = by & m;
        let (quotient, remainder) = (dividend.checked_div(by)?, dividend.checked_rem(by)?);
        (quotient <= m).then_some((quotient, remainder))
    }
}

/// SHL, SHR, SAR, ROL and ROR.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shift {
    Left,
    Right,
    Arithmetic,
    RotateLeft,
    RotateRight,
}

/// Shifts by `count`, already without its upper bits; `old` are the flags before.
pub(super) fn shift(kind: Shift, a: u64, count: u32, size: usize, old: u64) -> (u64, u64) {
    let (a, bits) = (a & mask(size), 8 * size as u32);
    if count == 0 {
        return (a, old);
    }
    let top = |value: u64| value >> (bits - 1) & 1;
    match kind {
        Shift::Left => {
            let wide = u128::from(a) << count;
            let carry = (wide >> bits) as u64 & 1;
            let result = wide as u64 & mask(size);
            (
                result,
                carry | (top(result) ^ carry) << 11 | of_result(result, size),
            )
        }
        Shift::Right => {
            let carry = u64::from(count <= bits) & a >> (count - 1) & 1;
            let result = if count < 64 { a >> count } else { 0 };
            (result, carry | top(a) << 11 | of_result(result, size))
        }
        Shift::Arithmetic => {
            let wide = ((a << (64 - bits)) as i64) >> (64 - bits);
            let carry = (wide >> (count - 1).min(63)) as u64 & 1;
            let result = (wide >> count.min(63)) as u64 & mask(size);
            (result, carry | of_result(result, size))
        }
        Shift::RotateLeft | Shift::RotateRight => {
            let by = count % bits;
            let left = if kind == Shift::RotateLeft {
                by
            } else {
                (bits - by) % bits
            };
            let result = (a << left | a >> ((bits - left) % bits)) & mask(size);
            let (carry, overflow) = if kind == Shift::RotateLeft {
                (result & 1, top(result) ^ result & 1)
            } else {
                (top(result), top(result) ^ result >> (bits - 2) & 1)
            };
            let kept = old & !(rflags::CF | rflags::OF);
            (result, kept | carry | overflow << 11)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rflags::{AF, CF, OF, PF, SF, ZF};

    #[test]
    fn sums_and_differences_have_the_manual_s_flags() {
        assert_eq!(add(0xff, 1, 0, 1), (0, CF | ZF | PF | AF));
        assert_eq!(add(0x7fff, 1, 0, 2), (0x8000, OF | SF | PF | AF));
        assert_eq!(add(0xffff_ffff, 0, 1, 4), (0, CF | ZF | PF | AF));
        assert_eq!(subtract(0, 1, 0, 4), (0xffff_ffff, CF | SF | PF | AF));
        assert_eq!(subtract(0x80, 1, 0, 1), (0x7f, OF | AF));
        assert_eq!(subtract(5, 4, 1, 2), (0, ZF | PF));
        assert_eq!(logic(0x8000_0000, 4), (0x8000_0000, SF | PF));
    }

    #[test]
    fn divisions_fail_where_the_quotient_does_not_fit() {
        assert_eq!(divide(0, 7, 2, 1, false), Some((3, 1)));
        assert_eq!(divide(1, 0, 2, 4, false), Some((0x8000_0000, 0)));
        assert_eq!(divide(2, 0, 2, 4, false), None);
        assert_eq!(divide(0, 7, 0, 2, false), None);
        // -7 / 2, and the one quotient without a positive twin.
        assert_eq!(divide(0xff, 0xf9, 2, 1, true), Some((0xfd, 0xff)));
        assert_eq!(divide(0xffff, 0x8000, 1, 2, true), Some((0x8000, 0)));
        assert_eq!(divide(0xffff, 0x8000, 0xffff, 2, true), None);
        assert_eq!(divide(1 << 31, 0, 0xffff_ffff, 4, true), None);
    }

    #[test]
    fn shifts_leave_the_last_bit_in_the_carry() {
        assert_eq!(shift(Shift::Left, 0x81, 1, 1, 0), (2, CF | OF));
        assert_eq!(shift(Shift::Right, 3, 1, 4, 0), (1, CF));
        assert_eq!(
            shift(Shift::Right, 0x8000, 16, 2, 0),
            (0, CF | OF | ZF | PF)
        );
        assert_eq!(shift(Shift::Arithmetic, 0x80, 7, 1, 0), (0xff, SF | PF));
        assert_eq!(
            shift(Shift::RotateLeft, 0x8001, 1, 2, ZF),
            (3, CF | OF | ZF)
        );
        assert_eq!(
            shift(Shift::RotateRight, 1, 1, 4, 0),
            (0x8000_0000, CF | OF)
        );
        assert_eq!(shift(Shift::Left, 1, 0, 4, SF), (1, SF));
    }
}
