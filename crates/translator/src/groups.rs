//! Finds accesses that can share one page check: all of a block's stack
//! accesses, and accesses through the same unchanged base register. One group per
//! base may be open at a time: its addend is kept in the context.

use crate::plan::Step;
use crate::reencode::immediate;
use crate::table::Class;
use iced_x86::{Code, Register};

/// Bytes that a group on a base may span.
const GROUP_BYTES_MAX: i64 = 1024;
/// Bytes that a block's stack accesses may span.
const STACK_BYTES_MAX: i64 = 2048;
const RSP: u8 = 4;
/// Registers that may be a base: r14 and r15 are not in registers.
const BASES: usize = 14;

/// A shared check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Check {
    /// The step before which it is done.
    pub step: usize,
    pub stack: bool,
    pub base: u8,
    /// Lowest address, from the base's value at the check.
    pub lowest: i32,
    pub len: u16,
    pub write: bool,
}

/// All shared checks of a block; reused from block to block.
#[derive(Default)]
pub(crate) struct Groups {
    /// In the order in which they are done.
    pub checks: Vec<Check>,
    /// Steps whose stack access is covered, a bit each.
    pub stack: u64,
    /// Steps whose memory operand is covered by a check on its base.
    pub based: u64,
    depths: Vec<i64>,
}

struct Open {
    base: u8,
    first: usize,
    low: i64,
    high: i64,
    write: bool,
    members: u64,
}

struct Stack {
    depth: i64,
    low: i64,
    high: i64,
    first: usize,
    members: u64,
    /// RSP is no longer known.
    lost: bool,
}

impl Groups {
    pub(crate) fn clear(&mut self) {
        self.checks.clear();
        self.stack = 0;
        self.based = 0;
    }

    /// Plans the block.
    pub(crate) fn plan(&mut self, steps: &[Step]) {
        self.clear();
        self.depths.clear();
        let mut stack = Stack {
            depth: 0,
            low: i64::MAX,
            high: i64::MIN,
            first: usize::MAX,
            members: 0,
            lost: false,
        };
        let mut open: [Option<Open>; BASES] = Default::default();
        for (i, step) in steps.iter().enumerate() {
            self.depths.push(stack.depth);
            if step.class == Class::Interpret {
                break;
            }
            let (mut low, mut high) = (i64::MAX, i64::MIN);
            if step.memory
                && matches!(
                    step.class,
                    Class::Copy | Class::Push | Class::JumpIndirect | Class::CallIndirect
                )
            {
                let base = step.plain_base().filter(|_| !step.wants_low_address());
                let disp = step.ins.memory_displacement64() as i64;
                let end = disp + i64::from(step.size);
                match base {
                    Some(RSP) => {
                        low = stack.depth + disp;
                        high = stack.depth + end;
                    }
                    Some(base) => {
                        if let Some(group) = open.get_mut(usize::from(base)) {
                            self.join(group, i, base, disp, end, step.write);
                        }
                    }
                    None => {}
                }
            }
            match step.class {
                Class::Push | Class::PushFlags | Class::Call | Class::CallIndirect => {
                    low = low.min(stack.depth - 8);
                    high = high.max(stack.depth);
                }
                Class::Pop | Class::Return => {
                    low = stack.depth;
                    high = stack.depth + 8;
                }
                Class::Leave => stack.lost = true,
                _ => {}
            }
            if low <= high && !stack.lost {
                stack.take(i, low, high);
            }
            stack.follow(step);
            for (base, group) in open.iter_mut().enumerate() {
                if writes(step, base as u8) {
                    self.close(group);
                }
            }
        }
        for group in &mut open {
            self.close(group);
        }
        self.finish_stack(steps, &stack);
        self.checks.sort_by_key(|check| (check.step, !check.stack));
    }

    fn join(
        &mut self,
        open: &mut Option<Open>,
        i: usize,
        base: u8,
        disp: i64,
        end: i64,
        write: bool,
    ) {
        if let Some(group) = open
            && group.base == base
            && group.high.max(end) - group.low.min(disp) <= GROUP_BYTES_MAX
        {
            group.low = group.low.min(disp);
            group.high = group.high.max(end);
            group.write |= write;
            group.members |= 1 << i;
            return;
        }
        self.close(open);
        *open = Some(Open {
            base,
            first: i,
            low: disp,
            high: end,
            write,
            members: 1 << i,
        });
    }

    fn close(&mut self, open: &mut Option<Open>) {
        if let Some(group) = open.take()
            && group.members.count_ones() >= 2
            && let (Ok(lowest), Ok(_)) = (i32::try_from(group.low), i32::try_from(group.high))
        {
            self.based |= group.members;
            self.checks.push(Check {
                step: group.first,
                stack: false,
                base: group.base,
                lowest,
                len: (group.high - group.low) as u16,
                write: group.write,
            });
        }
    }

    /// One access alone gains nothing from a shared check, but where flags are live
    /// at it and dead before it.
    fn finish_stack(&mut self, steps: &[Step], stack: &Stack) {
        let Some(first) = steps.get(stack.first) else {
            return;
        };
        if stack.members.count_ones() < 2 && !first.keeps_flags() {
            return;
        }
        let dead = |step: &Step| !step.keeps_flags();
        let at = steps
            .get(..=stack.first)
            .and_then(|head| head.iter().rposition(dead))
            .unwrap_or(stack.first);
        let depth = self.depths.get(at).copied().unwrap_or(0);
        if let Ok(lowest) = i32::try_from(stack.low - depth) {
            self.stack = stack.members;
            self.checks.push(Check {
                step: at,
                stack: true,
                base: RSP,
                lowest,
                len: (stack.high - stack.low) as u16,
                write: true,
            });
        }
    }
}

impl Stack {
    fn take(&mut self, i: usize, low: i64, high: i64) {
        let (low, high) = (self.low.min(low), self.high.max(high));
        if high - low > STACK_BYTES_MAX {
            self.lost = true;
        } else {
            self.low = low;
            self.high = high;
            self.first = self.first.min(i);
            self.members |= 1 << i;
        }
    }

    /// Follows what the instruction does to RSP.
    fn follow(&mut self, step: &Step) {
        let ins = &step.ins;
        match step.class {
            Class::Push | Class::PushFlags | Class::Call | Class::CallIndirect => self.depth -= 8,
            Class::Pop => {
                self.depth += 8;
                self.lost |= !step.memory && writes(step, RSP);
            }
            Class::Lea if ins.op0_register() == Register::RSP => {
                if step.plain_base() == Some(RSP) {
                    self.depth += ins.memory_displacement64() as i64;
                } else {
                    self.lost = true;
                }
            }
            _ if writes(step, RSP) => {
                let by = immediate(ins, step.row.immediate) as i64;
                match ins.code() {
                    Code::Add_rm64_imm8 | Code::Add_rm64_imm32 => self.depth += by,
                    Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 => self.depth -= by,
                    _ => self.lost = true,
                }
            }
            _ => {}
        }
        // Nothing near 2^31 is followed, so that sums cannot overflow.
        self.lost |= self.depth.unsigned_abs() > 1 << 30;
    }
}

/// Does the step write general register `register`?
fn writes(step: &Step, register: u8) -> bool {
    step.writes >> register & 1 != 0
}
