package main

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// linux/netfilter/nfnetlink_queue.h
const (
	nfqMsgPacket, nfqMsgVerdict, nfqMsgConfig = 0, 1, 2

	nfqCfgCmd, nfqCfgParams = 1, 2
	nfqCfgBind              = 1
	nfqCopyMeta             = 1

	nfqPacketHdr, nfqVerdictHdr, nfqMark = 1, 2, 3
)

// verdicts are those that a program may give (linux/netfilter.h).
var verdicts = map[string]uint32{"drop": 0, "accept": 1, "repeat": 4, "stop": 5}

// answer is what packets of a queue get: a verdict and, if it is not 0, a mark.
type answer struct{ verdict, mark uint32 }

// parseQueues reads "1=accept,2=repeat/9": numbers of queues with their answers.
func parseQueues(spec string) (map[uint16]answer, error) {
	queues := map[uint16]answer{}
	for part := range strings.SplitSeq(spec, ",") {
		var n uint16
		var a answer
		number, rest, _ := strings.Cut(part, "=")
		verdict, mark, marked := strings.Cut(rest, "/")
		_, err := fmt.Sscan(number, &n)
		if err == nil && marked {
			_, err = fmt.Sscan(mark, &a.mark)
		}
		var ok bool
		if a.verdict, ok = verdicts[verdict]; err != nil || !ok {
			return nil, fmt.Errorf("queue %q: want NUMBER=VERDICT[/MARK], with accept, drop, repeat or stop", part)
		}
		queues[n] = a
	}
	return queues, nil
}

// queue reads queues of NFQUEUE and answers o.n packets, one after the other.
func queue(spec string, o options) error {
	queues, err := parseQueues(spec)
	if err != nil {
		return err
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	for n := range queues {
		for _, a := range []netlink.Attribute{
			{Type: nfqCfgCmd, Data: []byte{nfqCfgBind, 0, 0, 0}},
			{Type: nfqCfgParams, Data: []byte{0, 0, 0, 0, nfqCopyMeta}},
		} {
			m, err := queueMessage(n, nfqMsgConfig, netlink.Acknowledge, a)
			if err != nil {
				return err
			}
			if _, err := c.Execute(m); err != nil {
				return fmt.Errorf("bind queue %d: %w", n, err)
			}
		}
	}
	if err := ready(o); err != nil {
		return err
	}
	for i := 0; o.forever || i < o.n; {
		got, err := c.Receive()
		if err != nil {
			return fmt.Errorf("packet %d: %w", i+1, err)
		}
		for _, m := range got {
			n, id, err := queued(m)
			if err != nil {
				return err
			}
			a := queues[n]
			attrs := []netlink.Attribute{{Type: nfqVerdictHdr, Data: binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, a.verdict), id)}}
			if a.mark != 0 {
				attrs = append(attrs, netlink.Attribute{Type: nfqMark, Data: binary.BigEndian.AppendUint32(nil, a.mark)})
			}
			m, err := queueMessage(n, nfqMsgVerdict, 0, attrs...)
			if err != nil {
				return err
			}
			if _, err := c.Send(m); err != nil {
				return fmt.Errorf("packet %d: %w", i+1, err)
			}
			i++
		}
	}
	return nil
}

// queueMessage is a message about queue n, behind its struct nfgenmsg.
func queueMessage(n uint16, kind int, flags netlink.HeaderFlags, attrs ...netlink.Attribute) (netlink.Message, error) {
	data, err := netlink.MarshalAttributes(attrs)
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_QUEUE<<8 | kind), Flags: netlink.Request | flags},
		Data:   append([]byte{unix.AF_UNSPEC, 0, byte(n >> 8), byte(n)}, data...),
	}, err
}

// queued is in which queue a packet is, and by what number it is known there.
func queued(m netlink.Message) (n uint16, id uint32, err error) {
	if m.Header.Type != unix.NFNL_SUBSYS_QUEUE<<8|nfqMsgPacket || len(m.Data) < 4 {
		return 0, 0, fmt.Errorf("message of type %#x", m.Header.Type)
	}
	attrs, err := netlink.UnmarshalAttributes(m.Data[4:])
	if err != nil {
		return 0, 0, err
	}
	for _, a := range attrs {
		if a.Type == nfqPacketHdr && len(a.Data) >= 4 {
			return binary.BigEndian.Uint16(m.Data[2:]), binary.BigEndian.Uint32(a.Data), nil
		}
	}
	return 0, 0, fmt.Errorf("a message without a packet")
}
