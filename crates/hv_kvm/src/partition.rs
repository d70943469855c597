//! One machine of KVM's.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use hv::{Error, Gpa, Interrupts, Partition, Shared};

use crate::hypervisor::PINS;
use crate::ioctl::Vm;
use crate::machine_state::KvmShared;
use crate::vcpu::KvmVcpu;
use crate::{NAME, failed};

/// One machine on the KVM engine.
#[derive(Debug)]
pub struct KvmPartition {
    vm: Arc<Vm>,
    cpus: Vec<Option<KvmVcpu>>,
}

impl KvmPartition {
    pub(crate) fn new(vm: Arc<Vm>, cpus: Vec<Option<KvmVcpu>>) -> Self {
        Self { vm, cpus }
    }
}

impl Partition for KvmPartition {
    type Vcpu = KvmVcpu;

    fn vcpu(&mut self, index: u8) -> Result<KvmVcpu, Error> {
        let slot = self.cpus.get_mut(usize::from(index));
        slot.and_then(Option::take)
            .ok_or(Error::NoSuchVcpu { index })
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        Arc::new(Lines(Arc::clone(&self.vm)))
    }

    fn shared(&self) -> Arc<dyn Shared> {
        Arc::new(KvmShared(Arc::clone(&self.vm)))
    }

    fn doorbell(&self, at: Gpa, value: u32, bell: BorrowedFd<'_>) -> Result<bool, Error> {
        self.vm
            .ring_on_store(at.0, value, bell)
            .map_err(failed("have KVM ring a doorbell"))?;
        Ok(true)
    }
}

struct Lines(Arc<Vm>);

impl Interrupts for Lines {
    fn set_line(&self, gsi: u32, high: bool) {
        // As the software engine: there is nothing at lines beyond the IOAPIC.
        if gsi >= PINS {
            return;
        }
        if let Err(error) = self.0.fd().set_irq_line(gsi, high) {
            tracing::error!(gsi, "the {NAME} engine cannot drive a line: {error}");
        }
    }
}
