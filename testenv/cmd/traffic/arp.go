package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

const (
	etherARP = 0x0806 // ETH_P_ARP
	arpReply = 2      // ARPOP_REPLY
)

// sendARP sends ARP packets from the namespace's eth0, past its own hooks: op 1 asks
// for the address, at the broadcast address; any other tells it, to -to. The sender's
// address is -from, or else eth0's.
func sendARP(target string, o options) error {
	ifi, err := net.InterfaceByName("eth0")
	if err != nil {
		return err
	}
	dst, err := netip.ParseAddr(target)
	if err != nil {
		return err
	}
	var src netip.Addr
	if o.from != "" {
		if src, err = netip.ParseAddr(o.from); err != nil {
			return err
		}
	} else if src, err = ipv4Of(ifi); err != nil {
		return err
	}
	if !src.Is4() || !dst.Is4() {
		return fmt.Errorf("want IPv4 addresses, not %v and %v", src, dst)
	}
	mac := ifi.HardwareAddr
	to, of := net.HardwareAddr{255, 255, 255, 255, 255, 255}, make(net.HardwareAddr, 6)
	if o.to != "" {
		if to, err = net.ParseMAC(o.to); err != nil {
			return err
		}
		if o.op >= arpReply {
			of = to
		}
	}
	b := append(append([]byte{}, to...), mac...)
	b = binary.BigEndian.AppendUint16(b, etherARP)
	b = append(b, 0, 1, 8, 0, 6, 4) // Ethernet, IPv4, and the lengths of their addresses
	b = binary.BigEndian.AppendUint16(b, uint16(o.op))
	b = append(append(b, mac...), src.AsSlice()...)
	b = append(append(b, of...), dst.AsSlice()...)

	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range o.n {
		if err := unix.Sendto(fd, b, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index}); err != nil {
			return err
		}
	}
	return nil
}

func ipv4Of(ifi *net.Interface) (netip.Addr, error) {
	addrs, err := ifi.Addrs()
	if err != nil {
		return netip.Addr{}, err
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			return p.Addr(), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%s has no IPv4 address", ifi.Name)
}
